"""What a model costs to store and to run."""

import itertools
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from engine.datasets import Dataset
from engine.device import forward_pass, memory_format, synchronize
from engine.images import prepare
from engine.inference import fold_batchnorm
from engine.models import Architecture
from engine.settings import Config, Model
from report.comparisons import Models, distilled


class Operations(TorchDispatchMode):
    """Records the operations that are executed in this context."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch._ops.OpOverload] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.seen.add(operation)
        return operation(*args, **(kwargs or {}))


def multiplies(operation: torch._ops.OpOverload) -> bool:
    """Whether an operation may hold products of matrices: by its name, or because it is not one of PyTorch's own."""
    name = operation.overloadpacket.__name__
    products = re.search(r"attention|conv|rnn|lstm|gru|_encoder_layer|(mm|mv|dot)$", name)
    return products is not None or operation.namespace not in ("aten", "prim", "prims")


def count_cost(arch: Architecture, classes: int, image_size: int) -> dict[str, Any]:
    """Parameters, and multiply-accumulates (two FLOPs each) of one image in convolutions and matrix products.

    Attention is computed without fused kernels, which the counter does not know. `not_counted` names the operations
    that it does not know either and that may hold such products.
    """
    model, fused = arch.build(classes).eval(), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.inference_mode(),
            sdpa_kernel(SDPBackend.MATH),
            Operations() as operations,
            FlopCounterMode(display=False) as counter,
        ):
            model(torch.zeros(1, 3, image_size, image_size))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    unknown = {op for op in operations.seen if op.overloadpacket not in counter.flop_registry and multiplies(op)}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "multiply_accumulates": counter.get_total_flops() // 2,
        "not_counted": sorted({str(operation.overloadpacket) for operation in unknown}),
    }


def quartiles(values: Sequence[float]) -> dict[str, Any]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "quartiles": [low, high], "n": len(values)}


def time_inference(
    archs: Iterable[Architecture], config: Config, dataset: Dataset, batch_size: int = 100, seconds: float = 2.0
) -> dict[Architecture, dict[str, Any]]:
    """Latency of one image and throughput of a large batch for each architecture, from uint8 images to logits.

    The architectures alternate, so that drift in the machine's speed affects all, for 3 to 20 rounds in about
    `seconds` seconds. The weights do not matter: they are random, with BatchNorm folded.
    """
    count, device, precision = len(dataset.test.images), config.device, config.precision
    images = dataset.test.images[torch.arange(batch_size, device=dataset.test.images.device) % count].to(device)
    models = {}
    for arch in archs:
        model = arch.build(len(dataset.classes)).to(device).to(memory_format=memory_format(device))
        models[arch] = fold_batchnorm(model, prepare(images[:4], config.image_size), precision)

    def timed(arch: Architecture, batch: torch.Tensor) -> float:
        synchronize(device)
        started = time.perf_counter()
        with torch.inference_mode(), forward_pass(device, precision):
            models[arch](prepare(batch, config.image_size)).float()
        synchronize(device)
        return time.perf_counter() - started

    for arch, batch in itertools.product(models, (images[:1], images)):
        timed(arch, batch)  # warm up
    latency: dict[Architecture, list[float]] = {arch: [] for arch in models}
    throughput: dict[Architecture, list[float]] = {arch: [] for arch in models}
    end, rounds = time.monotonic() + seconds, 0
    while rounds < 3 or (rounds < 20 and time.monotonic() < end):
        for arch in models:
            latency[arch] += [1000 * timed(arch, images[:1]) for _ in range(5)]
            throughput[arch].append(batch_size / timed(arch, images))
        rounds += 1
    return {
        arch: {
            "latency_ms": quartiles(latency[arch]),
            "images_per_second": {"batch_size": batch_size, **quartiles(throughput[arch])},
        }
        for arch in models
    }


def costs(config: Config, dataset: Dataset, models: Models) -> dict[str, dict[str, Any]]:
    """The cost of each model that is not only logits, measured once for each architecture."""
    arch_of = {name: Architecture.of(m.recipe) for name, m in models.items() if not m.recipe.logits_file}
    archs = dict.fromkeys(arch_of.values())
    counted = {arch: count_cost(arch, len(dataset.classes), config.image_size) for arch in archs}
    timed = time_inference(archs, config, dataset)

    def size(name: str) -> int:
        return Model(name, next(iter(models[name].logits)), config).path.stat().st_size

    return {name: {**counted[arch], "bytes_on_disk": size(name), **timed[arch]} for name, arch in arch_of.items()}


def versus_teacher(models: Models, cost: dict[str, dict[str, Any]], labels: np.ndarray) -> list[dict[str, Any]]:
    """Accuracy, over the seeds that both have, and relative cost of each distilled model and its teacher."""
    rows = []
    for name, (teacher, seeds) in distilled(models).items():
        if teacher not in cost:
            continue
        accuracy = float(models[name].correct(labels, seeds).mean())
        of_teacher = float(models[teacher].correct(labels, seeds.values()).mean())
        speed, speed_of_teacher = (cost[m]["images_per_second"]["median"] for m in (name, teacher))
        relative = {key: cost[name][key] / cost[teacher][key] for key in ("parameters", "multiply_accumulates")}
        about = {"model": name, "teacher": teacher, "accuracy": accuracy, "accuracy_of_teacher": of_teacher}
        rows.append({**about, "time": speed_of_teacher / speed, **relative})
    return rows
