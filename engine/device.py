"""The device, its precision, and PyTorch's options for speed and determinism."""

import contextlib
import ctypes
import os
import platform
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torchvision
from torch import nn

from engine.console import log
from engine.convolution import SmallConvolutions
from engine.distributed import RankError, local_rank, world_size
from engine.errors import UserError, first_line
from engine.reach import code_digest
from engine.settings import Config


def resolve_device(config: Config) -> Config:
    """The config with this process's own device in place of "auto". Raises UserError for one that is not available."""
    device, gpus = config.device, torch.cuda.device_count() if torch.cuda.is_available() else 0
    why = "" if gpus else why_gpus_are_unusable()
    if device == "auto":
        device = "cuda" if gpus else "mps" if torch.backends.mps.is_available() else "cpu"
        if why:
            log.info(f"warning: device = auto: takes the {device}, because {why}")
    kind, _, number = device.partition(":")
    if world_size() > 1:
        if number or kind == "mps":
            raise UserError(f"device = {device!r}: with several processes must be cuda (one GPU each) or cpu")
        if config.batch_size < 2 * world_size():
            raise UserError(f"batch_size = {config.batch_size}: must be 2 or more for each of {world_size()} processes")
        number = str(local_rank()) if kind == "cuda" else ""
        device = f"cuda:{number}" if number else device
    if kind == "cuda" and int(number or 0) >= gpus:
        fewer = "start no more processes than that, or " if world_size() > 1 else ""
        why = why or f"the number of CUDA devices here is {gpus}"
        raise UserError(f"device = {device!r}: {why}; {fewer}try cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device = {device!r}: this machine has no MPS device; try cpu")
    if world_size() > 1 and config.jobs > 1:
        raise UserError(f"jobs = {config.jobs}: must be 1 with several processes, which train each model together")
    return replace(config, device=device)


def why_gpus_are_unusable() -> str:
    """The reason if there are GPUs that PyTorch cannot use, usually because of an old driver; else nothing."""
    if not torch.cuda.device_count():  # which counts them without CUDA
        return ""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return f"PyTorch, built for CUDA {torch.version.cuda}, cannot use the GPU here: {first_line(error)}"
    return ""


def supports_bf16(device: str) -> bool:
    """Whether bfloat16 may be faster than float32 here, because the hardware supports it."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # an older PyTorch, which has no public name for these
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one on ARM


def memory_format(device: str | torch.device) -> torch.memory_format:
    """channels_last, the faster one, except on MPS, where PyTorch computes wrong BatchNorm gradients in it."""
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def place(model: nn.Module, device: str | torch.device) -> nn.Module:
    """The model, moved to a device and into the memory format that suits it."""
    return model.to(device).to(memory_format=memory_format(device))


@contextlib.contextmanager
def forward_pass(device: str | torch.device, precision: str) -> Iterator[None]:
    """The context of training and prediction: bfloat16 where that is the precision, small convolutions on a CPU."""
    kind = torch.device(device).type
    small_convolutions = SmallConvolutions() if kind == "cpu" else contextlib.nullcontext()
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=precision == "bf16"), small_convolutions:
        yield


# Random numbers have a stream for each purpose. The order of the images and the initial weights are drawn from streams
# without a number: NumPy's default_rng((seed, epoch)) and torch.manual_seed(seed).
DROPOUT, AUGMENTATION, SHUFFLED_TEACHER = 1, 2, 3


def seed_sequence(stream: int, *position: int) -> np.random.SeedSequence:
    """Random numbers of a stream at a position, up to four numbers such as seed, epoch and step.

    With `spawn_key` they differ from those of every other stream. Without it, NumPy ignores zeros at the end of a
    position, so that (seed, epoch, step) and (seed, epoch, step, 0) would share them.
    """
    return np.random.SeedSequence(position, spawn_key=(stream,))


seeding = threading.Lock()  # a thread may augment images, with PyTorch's one generator, while the network trains


def seed_torch(stream: int, *position: int) -> None:
    """Seed torch's generators with `seed_sequence`."""
    with seeding:
        torch.manual_seed(int(seed_sequence(stream, *position).generate_state(1, np.uint64)[0]))


@contextlib.contextmanager
def seeded(stream: int, *position: int) -> Iterator[None]:
    """A context in which the CPU's generator is seeded with `seed_sequence`; it is then as it was before."""
    with seeding, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed_sequence(stream, *position).generate_state(1, np.uint64)[0]))
        yield


def synchronize(device: str | torch.device) -> None:
    """Wait for the device, as a timer has to."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def configure_backends(config: Config) -> None:
    """Set PyTorch's process-wide switches for this device.

    On a CPU, glibc is told to keep the memory of freed tensors: otherwise each large one is returned to the system and
    mapped anew, page by page, in the next step, which costs 40% of a ResNet50 step at 224 px.
    """
    global configured
    configured = config
    if torch.device(config.device).index is not None:
        torch.cuda.set_device(config.device)  # PyTorch answers questions about the current device only
    torch.backends.cudnn.benchmark = not config.deterministic  # all batches of training have one shape
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it, before its first call
    if config.device == "cpu":
        with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such switch
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets a mapping of its own
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the end of the heap back


@contextlib.contextmanager
def without_tuning() -> Iterator[None]:
    """A context in which cuDNN does not time its algorithms, as it would for each new size of a batch."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def compiled(model: nn.Module, config: Config, seconds: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """torch.compile, if `compile` is on, or if it is auto and the `seconds` of training that are expected repay it.

    On CUDA, fused BatchNorm is estimated to save about a fifth of a step, by its memory traffic (not measured), and
    compiling takes about a minute. With auto, a model whose forward pass cannot be compiled runs as it is.
    """
    pays = torch.device(config.device).type == "cuda" and not config.deterministic and seconds / 5 > 60
    if config.compile == "off" or (config.compile == "auto" and not pays):
        return model
    log.info("torch.compile: the first step takes about a minute longer")
    torch._dynamo.config.suppress_errors = config.compile == "auto"
    return torch.compile(model)


configured: Config | None = None  # what this process was last configured for
OUT_OF_MEMORY = (  # as CUDA and MPS, a CPU, cuDNN while it tries algorithms, and CUDA's libraries say it
    *("out of memory", "can't allocate memory", "unable to find an engine", "ALLOC_FAILED"),
)


def is_out_of_memory(error: RuntimeError) -> bool:
    return any(words in str(error) for words in OUT_OF_MEMORY)


@contextlib.contextmanager
def explain_device_errors() -> Iterator[None]:
    """Turn out-of-memory and torch.compile errors into a UserError that says what to change."""
    try:
        yield
    except RuntimeError as error:
        config = configured
        if config is None:
            raise
        if is_out_of_memory(error):
            other = ""
            if config.jobs > 1:
                other = "fewer --jobs, or "
            elif torch.device(config.device).type == "cuda":
                other = "more processes, or "
            raise RankError(
                f"{config.device} ran out of memory with batch_size = {config.batch_size} at {config.image_size} px "
                f"({first_line(error)}); use {other}a smaller --batch_size (with --overwrite), or end other programs "
                "that use the device"
            ) from None
        if "does not have a deterministic implementation" in str(error):
            raise UserError(f"deterministic = True: {first_line(error)}; leave it out, or use another arch") from None
        if config.compile == "off" or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        raise UserError(
            f"compile = {config.compile}: torch.compile failed ({first_line(error)}); try --compile off"
        ) from None


def device_name(config: Config) -> str:
    if torch.device(config.device).type == "cuda":
        return torch.cuda.get_device_name(config.device)
    return f"{config.device} ({platform.machine()})"


def describe_threads(config: Config) -> str:
    """The number of threads on a CPU, such as ", 2 threads"; nothing on another device."""
    return f", {torch.get_num_threads()} threads" if torch.device(config.device).type == "cpu" else ""


def describe_precision(config: Config) -> str:
    """The precision, noting that cuDNN computes float32 convolutions in TF32 by default."""
    on_cuda = torch.device(config.device).type == "cuda"
    convolution = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    tf32 = on_cuda and torch.cuda.is_tf32_supported() and convolution == "tf32"
    return config.precision + (" (convolutions in TF32)" if tf32 and config.precision == "fp32" else "")


def environment(config: Config) -> dict[str, str]:
    """What a result depends on besides the settings: on a CPU, also the number of threads."""
    found = {
        "code": code_digest(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,  # its generator decides the order of the images
        "device": device_name(config),
        "precision": describe_precision(config),
        "processes": str(world_size()),
    }
    if torch.device(config.device).type == "cpu":
        found["threads"] = str(torch.get_num_threads())  # among which sums are divided
    return found
