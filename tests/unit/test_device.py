import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo
import torchvision
from conftest import flags
from torch import nn

import evaluate
from config import PRESETS
from engine import device as devices
from engine.device import (
    AUGMENTATION,
    DROPOUT,
    SHUFFLED_TEACHER,
    compiled,
    configure_backends,
    describe_precision,
    device_name,
    environment,
    explain_device_errors,
    forward_pass,
    memory_format,
    resolve_device,
    seed_sequence,
    seed_torch,
    seeded,
    supports_bf16,
    synchronize,
)
from engine.distributed import RankError
from engine.errors import UserError

DEMO = replace(PRESETS["demo"], device="cpu", image_size=32, batch_size=25)


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many CUDA devices, with or without MPS: machine(cuda=2, mps=False)."""

    def has(cuda: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return has


# Which device


@pytest.mark.parametrize(
    ("cuda", "mps", "device"), [(1, False, "cuda"), (1, True, "cuda"), (0, True, "mps"), (0, False, "cpu")]
)
def test_auto_prefers_cuda_then_mps_then_the_cpu(machine, cuda, mps, device):
    machine(cuda, mps)
    assert resolve_device(replace(DEMO, device="auto")) == replace(DEMO, device=device)


def test_an_available_device_is_kept(config):
    assert resolve_device(config) == config


@pytest.mark.parametrize("device", ["cuda:99", "cuda:2", "mps"])
def test_an_unavailable_device_is_refused(machine, device):
    machine(cuda=2)
    with pytest.raises(
        UserError,
        match=rf"device = '{device}': (the number of CUDA devices here is|this machine has no MPS device).*; try cpu",
    ):
        resolve_device(replace(DEMO, device=device))


def test_a_gpu_that_pytorch_cannot_use_is_mentioned(monkeypatch, capsys):
    """As with an old driver: the driver counts one device, and CUDA none."""

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nMore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device(replace(DEMO, device="auto")).device == "cpu"
    assert not capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert resolve_device(replace(DEMO, device="auto")).device == "cpu"
    assert "driver on your system is too old" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"device = 'cuda': .* too old \(found version 11040\)\.; try cpu"):
        resolve_device(replace(DEMO, device="cuda"))


def test_each_process_has_its_own_device(machine, monkeypatch):
    machine(cuda=2)
    monkeypatch.setattr(devices, "world_size", lambda: 2)
    assert resolve_device(DEMO).device == "cpu"
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        for device in ("cuda", "auto"):
            assert resolve_device(replace(DEMO, device=device)).device == f"cuda:{rank}"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="is 2; start no more processes than that, or try cpu"):
        resolve_device(replace(DEMO, device="cuda"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda:0"}, "with several processes must be cuda"),
        ({"device": "mps"}, "with several processes must be cuda"),
        ({"batch_size": 3}, "batch_size = 3: must be 2 or more for each of 2 processes"),
    ],
)
def test_devices_that_several_processes_cannot_use_are_refused(machine, monkeypatch, changes, message):
    machine(cuda=2, mps=True)
    monkeypatch.setattr(devices, "world_size", lambda: 2)
    with pytest.raises(UserError, match=message):
        resolve_device(replace(DEMO, **changes))


# Precision


@pytest.mark.parametrize("instructions", [(), ("avx512_bf16",), ("amx_bf16",), ("bf16",)])
def test_a_cpu_supports_bf16_if_it_has_the_instructions(monkeypatch, instructions):
    found = {"avx2": True, "avx512_bf16": False} | dict.fromkeys(instructions, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert supports_bf16("cpu") == bool(instructions)
    assert not supports_bf16("mps")


def test_a_gpu_supports_bf16_unless_it_would_emulate_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not supports_bf16("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert supports_bf16("cuda:0")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_keeps_float32_weights(device, precision, dtype):
    layer = nn.Conv2d(3, 4, 1).to(device)
    with forward_pass(device, precision):
        assert layer(torch.zeros(1, 3, 2, 2, device=device)).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_fp32_on_cuda_mentions_tf32_convolutions(monkeypatch):
    tf32 = "fp32 (convolutions in TF32)"
    for allowed, supported, description in ((True, True, tf32), (True, False, "fp32"), (False, True, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda supported=supported: supported)
        with monkeypatch.context() as patch:
            precision = "tf32" if allowed else "ieee"
            patch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision=precision))
            assert describe_precision(replace(DEMO, device="cuda", precision="fp32")) == description
            assert describe_precision(replace(DEMO, device="cuda", precision="bf16")) == "bf16"
            assert describe_precision(replace(DEMO, device="cpu", precision="fp32")) == "fp32"


def test_the_memory_format_is_channels_last_except_on_mps():
    formats = {device: memory_format(device) for device in ("cpu", "cuda:1", "mps")}
    assert formats == {"cpu": torch.channels_last, "cuda:1": torch.channels_last, "mps": torch.contiguous_format}
    assert memory_format(torch.device("cpu")) == torch.channels_last


# Switches of PyTorch


def test_deterministic_sets_torchs_switches(config, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "to be restored")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        configure_backends(replace(config, deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert devices.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        configure_backends(config)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark


def test_synchronize_waits_for_the_given_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for device in ("cpu", "cuda:1", "mps"):
        synchronize(device)
    assert waited == ["cuda:1", "mps"]


@pytest.mark.parametrize(
    ("changes", "seconds", "compiles"),
    [
        *(({"device": "cuda"}, 1000, True), ({"device": "cuda"}, 100, False), ({"device": "cpu"}, 1e6, False)),
        *(({"device": "cuda", "deterministic": True}, 1e6, False), ({"device": "cuda", "compile": "off"}, 1e6, False)),
        *(({"device": "cpu", "compile": "on"}, 0, True), ({"device": "cuda", "compile": "on"}, 0, True)),
    ],
)
def test_a_model_is_compiled_on_request_or_if_it_pays(monkeypatch, capsys, changes, seconds, compiles):
    model, faster, dynamo = nn.Linear(1, 1), nn.Linear(1, 1), SimpleNamespace(suppress_errors=None)
    monkeypatch.setattr(torch, "compile", lambda _: faster)
    monkeypatch.setattr(torch._dynamo, "config", dynamo)
    config = replace(DEMO, **changes)
    assert compiled(model, config, seconds) is (faster if compiles else model)
    assert ("torch.compile" in capsys.readouterr().err) == compiles
    assert dynamo.suppress_errors is ((config.compile == "auto") if compiles else None)


# Errors of the device


@pytest.fixture
def explained(monkeypatch):
    """What a RuntimeError becomes in a run with this config: explained(DEMO, error)."""

    def explain(config, error) -> None:
        monkeypatch.setattr(devices, "configured", config)
        with explain_device_errors():
            raise error

    return explain


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_is_reported_with_the_batch_size(explained, error):
    with pytest.raises(
        RankError, match=r"cpu ran out of memory with batch_size = 25 at 32 px \(.*--batch_size"
    ) as found:
        explained(DEMO, error)
    assert str(error) in str(found.value)


def test_fewer_jobs_need_less_memory(explained):
    with pytest.raises(RankError, match="use fewer --jobs, or a smaller --batch_size"):
        explained(replace(DEMO, jobs=2), torch.OutOfMemoryError("CUDA out of memory"))


def test_an_architecture_that_cannot_be_deterministic_is_explained(explained):
    message = (
        r"deterministic = True: adaptive_avg_pool2d_backward_cuda does not have .*; leave it out, or use another arch"
    )
    error = RuntimeError("adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but ...")
    with pytest.raises(UserError, match=message):
        explained(replace(DEMO, deterministic=True), error)


def test_a_torch_compile_failure_is_explained(explained):
    failure = torch._dynamo.exc.Unsupported("a graph break\nand a long story")
    for value in ("on", "auto"):  # with auto, the backward pass is compiled where failures are not suppressed
        message = rf"compile = {value}: torch.compile failed \(a graph break\); try --compile off"
        with pytest.raises(UserError, match=message):
            explained(replace(DEMO, compile=value), failure)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        explained(replace(DEMO, compile="off"), failure)
    with pytest.raises(RuntimeError, match="shape"):
        explained(replace(DEMO, compile="on"), RuntimeError("shape"))


@pytest.mark.parametrize("where", ["load_dataset", "predict"])
def test_memory_that_runs_out_in_an_evaluation_is_explained(trained, monkeypatch, capsys, where):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluate, where, exhausted)
    words = flags(trained, "--imgs_path", str(trained / "none"))
    with pytest.raises(SystemExit) as exit:
        evaluate.main(words)
    assert exit.value.code == 2
    assert "ran out of memory" in capsys.readouterr().err


# Random numbers


def test_all_streams_of_random_numbers_differ():
    """Those with a number, those without one, which order the images, and torch's for the initial weights."""
    positions = list(itertools.product(range(3), repeat=4))
    shorter = [position[:n] for n in (1, 2, 3) for position in positions if not any(position[n:])]
    found = [
        tuple(seed_sequence(stream, *position).generate_state(2, np.uint64))
        for stream in (DROPOUT, AUGMENTATION, SHUFFLED_TEACHER)
        for position in positions
    ]
    plain = {tuple(np.random.SeedSequence(position).generate_state(2, np.uint64)) for position in positions + shorter}
    assert len(set(found)) == len(found) == 3 * 81
    assert not plain & set(found)
    assert all(first >= 2**32 for first, _ in found)  # no seed of the initial weights is so large


def test_the_numbers_of_an_image_leave_the_generator_as_it_was():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    with seeded(AUGMENTATION, 3, 0, 7):
        of_the_image = torch.rand(3)
    assert torch.equal(torch.random.get_rng_state(), state)
    seed_torch(AUGMENTATION, 3, 0, 7)
    assert torch.equal(torch.rand(3), of_the_image)
    seed_torch(DROPOUT, 3, 0, 7)
    assert not torch.equal(torch.rand(3), of_the_image)


# What is recorded


def test_the_environment_names_what_a_result_depends_on(config):
    found = environment(config)
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "numpy": np.__version__}
    assert versions.items() <= found.items()
    assert found["device"] == device_name(config)
    assert found["precision"].startswith("fp32")
    assert found["processes"] == "1"
    on_a_cpu = {"threads": str(torch.get_num_threads())} if config.device == "cpu" else {}
    assert {key: value for key, value in found.items() if key == "threads"} == on_a_cpu
    assert {type(value) for value in found.values()} == {str}  # plain values, which a checkpoint can hold


def test_device_name_of_gpu_and_cpu(config, device):
    name = device_name(config)
    assert name == torch.cuda.get_device_name() if device == "cuda" else name.startswith("cpu (")
