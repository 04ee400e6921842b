"""How fast this repository is compared with the original's way, in one run.

    python -m benchmarks.speed                       # 224 px, batch 100; under ten minutes on two CPU cores
    python -m benchmarks.speed --image_size 64 --rounds 5 --json speed.json

"plain" is the original's way, measured with the functions of benchmarks/reference.py: a DataLoader with PIL
transforms and one worker, float32, contiguous, the teacher's forward pass on every batch, `.item()` in every step,
evaluation in training mode. "ours" is `fit` and `predict` as the scripts call them, in the precision that `auto`
chooses; where the hardware supports bfloat16, training is also measured in the other one, and on a CPU, at up to 64 px,
also without engine/convolution.py. The variants alternate, so that drift in the machine's speed affects all, and plain
runs in a process of its own, as our process-wide settings would speed it up. The first, cold call of each is reported
separately; the figures are medians of the others, with their range.
"""

import argparse
import contextlib
import io
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

import engine.convolution
from benchmarks import reference
from custom_resnet import LossFunction, build_resnet, cross_entropy, fit
from engine.datasets import Dataset, Split, batches, to_device
from engine.device import (
    configure_backends,
    device_name,
    environment,
    memory_format,
    resolve_device,
    supports_bf16,
    synchronize,
)
from engine.errors import exit_on_error
from engine.estimate import time_training
from engine.inference import predict
from engine.models import Architecture
from engine.recipes import Recipe
from engine.settings import Config, Model
from engine.training import Meter, Training
from teacher_student_model import Distillation, distillation_terms, stored_logits

KD_EPOCHS = 10  # of the original's distilled student, over which the teacher's logits are shared
# Images/s that memory traffic allows one H200 at 224 px in bf16, eager: measured bandwidth, traffic layer by layer.
H200_ROOFLINE = {"ResNet50 training": 6_900, "ResNet18 training": 26_000}
H200_BYTES_PER_SECOND = 4.3e12  # of the copy that the bandwidth was measured with


def fit_recipe(
    network: nn.Module, recipe: Recipe, config: Config, dataset: Dataset, loss_fn: LossFunction, **more: Any
) -> list[dict[str, float]]:
    """`fit` for a recipe that is not in the config. `more` is the rest of what Training takes."""
    model = Model("benchmark", 0, replace(config, recipes={**config.recipes, "benchmark": recipe}))
    return fit(
        Training(network, model, len(dataset.subset(recipe.train_size, recipe.train_subset)), **more), dataset, loss_fn
    )


class PilImages(TorchDataset):
    """CIFAR-10 as torchvision serves it: an array of images, each turned into a PIL image and transformed."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, size: int):
        self.images, self.labels, self.transform = images, labels, reference.make_transform(flip=True, size=size)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


class Benchmark:
    def __init__(self, config: Config, steps: int):
        random = np.random.default_rng(0)
        self.config, self.steps, self.n = config, steps, config.batch_size * steps
        # One batch more for the plain way: its worker gets it ready before the clock starts, as in the middle of a run.
        images = random.integers(0, 256, (self.n + config.batch_size, 32, 32, 3), dtype=np.uint8)
        labels = random.integers(0, 10, len(images))
        self.pil = PilImages(images, labels, config.image_size)
        images, labels = images[: self.n], labels[: self.n]
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        split = to_device(Split(pixels, torch.from_numpy(labels)), config.device)
        few = Split(split.images[:2], split.labels[:2])
        self.dataset = Dataset(tuple("0123456789"), split, None, few, "")
        self.models = {}

    def model(self, arch: str, ours: bool) -> torch.nn.Module:
        if (arch, ours) not in self.models:
            layout = memory_format(self.config.device) if ours else torch.contiguous_format
            model = build_resnet(arch, 10, pretrained=False)
            self.models[arch, ours] = model.to(self.config.device, memory_format=layout)
        return self.models[arch, ours]

    def loader(self) -> DataLoader:
        start = "fork" if sys.platform == "linux" else None  # as a script gets it, not as this process was started
        return DataLoader(self.pil, self.config.batch_size, shuffle=True, num_workers=1, multiprocessing_context=start)

    def loader_with_a_batch_ready(self) -> Iterator:
        batches = iter(self.loader())
        next(batches)
        return batches

    def plain_training(self, arch: str, teacher: str | None = None, as_published: bool = False) -> dict[str, float]:
        """Seconds of `steps` steps, and those of them spent waiting for the next batch."""
        model, loss = self.model(arch, ours=False), reference.cross_entropy
        if teacher:
            loss = reference.make_distillation_loss(self.model(teacher, ours=False), as_published)
        loader, waited = self.loader_with_a_batch_ready(), []

        def batches() -> Iterator:
            for _ in range(self.steps):
                started_waiting = time.perf_counter()
                batch = next(loader)
                waited.append(time.perf_counter() - started_waiting)
                yield batch

        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):  # its line for each epoch
            reference.train(model, batches(), loss)
        return {"seconds": time.perf_counter() - started, "waited": sum(waited)}

    def our_training(
        self, arch: str, distilled: bool = False, other_precision: bool = False, conv2d_alone: bool = False
    ) -> dict[str, float]:
        precision = (
            {"bf16": "fp32", "fp32": "bf16"}[self.config.precision] if other_precision else self.config.precision
        )
        recipe = Recipe(arch=arch, epochs=1)
        logits = torch.randn(2, self.n, 10, device=self.config.device)
        loss_fn = Distillation(Recipe(teacher="teacher"), stored_logits(logits)) if distilled else cross_entropy
        convolution = torch.conv2d if conv2d_alone else engine.convolution.convolution
        with (
            contextlib.redirect_stderr(io.StringIO()),  # its line for each epoch
            mock.patch("engine.convolution.convolution", convolution),
        ):
            config = replace(self.config, precision=precision)
            history = fit_recipe(self.model(arch, ours=True), recipe, config, self.dataset, loss_fn)
        return {"seconds": history[-1]["seconds"]}

    def plain_evaluation(self, arch: str) -> dict[str, float]:
        loader = self.loader_with_a_batch_ready()
        started = time.perf_counter()
        reference.evaluate(self.model(arch, ours=False), loader, as_published=True)
        return {"seconds": time.perf_counter() - started}

    def our_evaluation(self, arch: str) -> dict[str, float]:
        started = time.perf_counter()
        images, config = self.dataset.train.images, self.config
        predict(self.model(arch, ours=True), images, config.image_size, config.precision).argmax(1).cpu()
        return {"seconds": time.perf_counter() - started}

    def plain_input(self) -> dict[str, float]:
        started = time.perf_counter()  # with its worker's start, and no batch ready beforehand
        for images, _ in self.loader():
            images.to(self.config.device)
        synchronize(self.config.device)
        return {"seconds": (time.perf_counter() - started) * self.n / len(self.pil)}

    def our_input(self) -> dict[str, float]:
        started = time.perf_counter()
        for _ in batches(self.dataset.train, self.dataset.subset(None), self.config, 0, 0):
            pass
        synchronize(self.config.device)
        return {"seconds": time.perf_counter() - started}

    def our_gradient_share(self) -> dict[str, float]:
        """Measured in each step here; `fit` measures it at most 50 times an epoch."""
        shape, device = (self.config.batch_size, 10), self.config.device
        logits, meter = torch.randn(shape, device=device, requires_grad=True), Meter(device)
        labels = torch.zeros(shape[0], dtype=torch.long, device=device)
        started = time.perf_counter()
        for _ in range(self.steps):
            terms = distillation_terms(logits, torch.randn(shape, device=device), labels, Recipe(teacher="teacher"))
            meter.measure_gradients(logits, terms)
        synchronize(device)
        return {"seconds": time.perf_counter() - started}


DISTILLED = {"arch": "resnet18", "teacher": "resnet50"}
VARIANTS = {  # name -> a method of Benchmark and its arguments
    "input, plain": ("plain_input", {}),
    "input, ours": ("our_input", {}),
    "gradient share, ours": ("our_gradient_share", {}),
    "ResNet50 training, plain": ("plain_training", {"arch": "resnet50"}),
    "ResNet50 training, ours": ("our_training", {"arch": "resnet50"}),
    "ResNet50 training, ours in the other precision": ("our_training", {"arch": "resnet50", "other_precision": True}),
    "ResNet50 training, ours with conv2d alone": ("our_training", {"arch": "resnet50", "conv2d_alone": True}),
    "ResNet18 training, plain": ("plain_training", {"arch": "resnet18"}),
    "ResNet18 training, ours": ("our_training", {"arch": "resnet18"}),
    "ResNet18 training, ours in the other precision": ("our_training", {"arch": "resnet18", "other_precision": True}),
    "ResNet18 training, ours with conv2d alone": ("our_training", {"arch": "resnet18", "conv2d_alone": True}),
    "distilled ResNet18, the original's (teacher with gradients)": (
        "plain_training",
        {**DISTILLED, "as_published": True},
    ),
    "distilled ResNet18, plain (teacher under no_grad)": ("plain_training", DISTILLED),
    "distilled ResNet18, ours (stored logits)": ("our_training", {"arch": "resnet18", "distilled": True}),
    "ResNet50 evaluation, plain": ("plain_evaluation", {"arch": "resnet50"}),
    "ResNet50 evaluation, ours": ("our_evaluation", {"arch": "resnet50"}),
    "ResNet18 evaluation, plain": ("plain_evaluation", {"arch": "resnet18"}),
    "ResNet18 evaluation, ours": ("our_evaluation", {"arch": "resnet18"}),
}
VARIATIONS = (" in the other precision", " with conv2d alone")  # of our training


def choose_precision(config: Config) -> Config:
    """The config in the precision that `auto` chooses for training a ResNet50 and a ResNet18 equally long."""
    precisions = ["fp32", *["bf16"] * supports_bf16(config.device)]
    archs = [Architecture(arch, "imagenet") for arch in ("resnet50", "resnet18")]
    per_image = time_training(archs, config, Benchmark(config, 1).dataset, precisions)
    return replace(config, precision=min(precisions, key=lambda p: sum(per_image[arch, p] for arch in archs)))


def run(bench: Benchmark, name: str) -> dict[str, float]:
    """One call of a variant: its own measurement, the wall time of the whole call and, on CUDA, its peak memory."""
    method, arguments = VARIANTS[name]
    on_cuda = bench.config.device.startswith("cuda")
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(bench.config.device)
    started = time.perf_counter()
    record = {**getattr(bench, method)(**arguments), "wall": time.perf_counter() - started}
    if on_cuda:
        record["peak_bytes"] = torch.cuda.max_memory_allocated(bench.config.device)
    return record


def start(config: Config, steps: int, ours: bool) -> None:
    global bench
    if ours:
        configure_backends(config)
    bench = Benchmark(config, steps)


def run_in_process(name: str) -> dict[str, float]:
    return run(bench, name)


def measure(config: Config, steps: int, rounds: int, enough: float) -> dict[str, list[dict[str, float]]]:
    """Each variant once, cold, and then in turn until it was measured `rounds` times or `enough` seconds.

    The two ways run in processes of their own; then the variations of ours, when the memory of these is free again.
    """
    times = in_turn([name for name in VARIANTS if not name.endswith(VARIATIONS)], config, steps, rounds, enough)
    applicable = (supports_bf16(config.device), config.device == "cpu" and config.image_size <= 64)
    endings = ("training, ours", *itertools.compress(VARIATIONS, applicable))
    if any(applicable):
        varied = in_turn([name for name in VARIANTS if name.endswith(endings)], config, steps, rounds, enough)
        times |= {f"{name} (alternating)": records for name, records in varied.items()}
    return times


def in_turn(
    variants: list[str], config: Config, steps: int, rounds: int, enough: float
) -> dict[str, list[dict[str, float]]]:
    times: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    spawn = get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = {
            ours: stack.enter_context(ProcessPoolExecutor(1, spawn, start, (config, steps, ours)))
            for ours in {"ours" in name for name in variants}
        }
        for number in range(1 + rounds):
            for name, records in times.items():
                if number > 1 and sum(record["seconds"] for record in records[1:]) > enough:
                    continue
                record = pools["ours" in name].submit(run_in_process, name).result()
                records.append(record)
                print(f"{'warm' if number else 'cold'}: {name}: {record['seconds']:.2f} s", file=sys.stderr)
    return times


def rate(times: list[dict[str, float]], images: int) -> dict[str, float]:
    rates = sorted(images / record["seconds"] for record in times)
    peak = {"peak_bytes": max(record["peak_bytes"] for record in times)} if "peak_bytes" in times[0] else {}
    return {"images_per_second": statistics.median(rates), "min": rates[0], "max": rates[-1], "n": len(rates), **peak}


def summarise(times: dict[str, list[dict[str, float]]], images: int) -> dict:
    rates = {name: rate(records, images) for name, records in times.items()}
    per_image = {name: 1 / entry["images_per_second"] for name, entry in rates.items()}
    stored, teacher_pass = per_image["distilled ResNet18, ours (stored logits)"], per_image["ResNet50 evaluation, ours"]
    with_teacher = {  # 2 views of each image, computed once for all epochs
        f"distilled ResNet18, ours (logits computed, over {KD_EPOCHS} epochs)": stored + 2 * teacher_pass / KD_EPOCHS,
        "distilled ResNet18, ours (logits computed for 1 epoch)": stored + 2 * teacher_pass,
    }
    per_image.update(with_teacher)
    rates.update({name: {"images_per_second": 1 / seconds} for name, seconds in with_teacher.items()})
    amortised, alone = with_teacher
    of_kd = (
        "distilled ResNet18, plain (teacher under no_grad)",
        "distilled ResNet18, the original's (teacher with gradients)",
    )
    pairs = [(f"{what}, ours", f"{what}, plain") for what in ("input", "ResNet50 training", "ResNet18 training")]
    pairs += [(ours, plain) for ours in (amortised, alone) for plain in of_kd]
    pairs += [(f"{what}, ours", f"{what}, plain") for what in ("ResNet50 evaluation", "ResNet18 evaluation")]
    waited = [record["waited"] / record["seconds"] for record in times["ResNet50 training, plain"]]
    return {
        "rates": rates,
        "variation_over_ours": {
            name: per_image[name] / per_image[name.replace(variation, "")]
            for name in rates
            for variation in VARIATIONS
            if variation in name
        },
        "ratios": [{"ours": a, "plain": b, "ratio": per_image[b] / per_image[a]} for a, b in pairs],
        "distilled_over_plain_epoch": stored / per_image["ResNet18 training, ours"],
        "gradient_share_of_step": per_image["gradient share, ours"] / stored,
        "input_share_of_step": {
            "ResNet50, ours": per_image["input, ours"] / per_image["ResNet50 training, ours"],
            "ResNet18, ours": per_image["input, ours"] / per_image["ResNet18 training, ours"],
            "ResNet50, plain (waiting for its worker)": statistics.median(waited),
        },
    }


def show(summary: dict, config: Config) -> None:
    print(f"{config.image_size} px, batch {config.batch_size}; {summary['environment']}\n")
    print("| images/s | median | range | n | first call, cold |\n| :-- | --: | --: | --: | --: |")
    for name, entry in summary["rates"].items():
        span = f"{entry['min']:,.1f} to {entry['max']:,.1f}" if "n" in entry else "from the rows above"
        cold = f"{summary['cold_seconds'][name]:.1f} s" if "n" in entry else ""
        roof = H200_ROOFLINE.get(name.removesuffix(", ours")) if "H200" in device_name(config) else None
        share = f" ({entry['images_per_second'] / roof:.0%} of the roofline)" if roof and "ours" in name else ""
        if "peak_bytes" in entry:
            cold += f", peak {entry['peak_bytes'] / 2**30:.1f} GiB"
        print(f"| {name} | {entry['images_per_second']:,.1f}{share} | {span} | {entry.get('n', '')} | {cold} |")
    print("\n| ours | against | times faster |\n| :-- | :-- | --: |")
    for pair in summary["ratios"]:
        print(f"| {pair['ours']} | {pair['plain']} | {pair['ratio']:.2f} |")
    print(f"\nA distilled step takes {summary['distilled_over_plain_epoch']:.3f} of a plain student's.")
    measuring = summary["gradient_share_of_step"]
    print(f"Measuring the share of the gradient takes {measuring:.2%} of a distilled step, if done in each.")
    for name, ratio in summary["variation_over_ours"].items():
        print(f"{name} ({summary['environment']['precision']} is chosen): {ratio:.2f} times the time of ours.")
    for name, share in summary["input_share_of_step"].items():
        print(f"Input path, share of the training step of {name}: {share:.1%}")


@exit_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="of ours; plain is always float32")
    parser.add_argument("--compile", default="off", choices=["on", "off"])
    parser.add_argument("--steps", type=int, help="a measurement; 1 on a CPU, else 50")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each; fewer of what takes long")
    parser.add_argument("--seconds", type=float, help="of measurements of each after which it is not measured again")
    parser.add_argument("--json", metavar="FILE", help="write every figure to this file")
    words = parser.parse_args()
    fields = ("image_size", "batch_size", "device", "precision", "compile")
    config = resolve_device(Config({"student": Recipe()}, **{field: getattr(words, field) for field in fields}))
    on_cpu = config.device == "cpu"
    if config.precision == "auto":
        config = choose_precision(config)
    steps, rounds = words.steps or (1 if on_cpu else 50), words.rounds
    times = measure(config, steps, rounds, enough=words.seconds or (40 if on_cpu else 60))
    cold = {name: records.pop(0)["wall"] for name, records in times.items()}
    summary = {
        "environment": environment(config),
        "image_size": config.image_size,
        "batch_size": config.batch_size,
        **summarise(times, steps * config.batch_size),
        "cold_seconds": cold,
    }
    show(summary, config)
    if words.json:
        with open(words.json, "w") as file:
            json.dump(summary, file, indent=2)


if __name__ == "__main__":
    main()
