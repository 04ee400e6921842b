"""What `python -m benchmarks.gpu` measures: each section takes the options and gives its variants by name.

A variant is a function without arguments that returns a record, which JSON can hold.
"""

import gc
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed import fit_recipe
from custom_resnet import LossFunction, build_resnet, cross_entropy
from engine.checkpoints import load_checkpoint
from engine.datasets import Dataset, Split, augments_on_host, batches, to_device
from engine.device import configure_backends, memory_format, resolve_device, synchronize
from engine.errors import first_line
from engine.estimate import time_training
from engine.images import prepare, resize
from engine.inference import predict
from engine.models import Architecture
from engine.recipes import Recipe
from engine.settings import Config
from report.metrics import kl_divergence
from teacher_student_model import Distillation, OnlineTeacher, Teacher, stored_logits, teacher_logits

ROOT = Path(__file__).parent.parent
ARCHS = ("resnet50", "resnet18")
RECIPE = Recipe(arch="resnet18", epochs=1, pretrained=False)


class Options(NamedTuple):
    device: str
    image_size: int
    batch_size: int
    steps: int  # of a measurement of speed
    repeats: int  # of a measurement of speed, after a first call that is not counted
    experiment: str  # flags of the experiment from beginning to end
    folder: str  # of gpu.json, gpu.md and the tests' logs


Variants = dict[str, Callable[[], dict[str, Any]]]


def configure(options: Options, **changes: Any) -> Config:
    """A config for this process, whose backends it sets."""
    fields = {"device": options.device, "image_size": options.image_size, "batch_size": options.batch_size}
    config = resolve_device(Config({"student": RECIPE}, **{**fields, "precision": "bf16", "compile": "off", **changes}))
    configure_backends(config)
    return config


def random_dataset(config: Config, steps: int, images_on_host: bool = False) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    n = config.batch_size * steps
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.randint(0, 10, (n,), generator=generator))
    split = to_device(split, config.device, images_on_host or augments_on_host(config))
    return Dataset(tuple("0123456789"), split, None, Split(split.images[:2], split.labels[:2]), "")


def make_model(arch: str, config: Config) -> nn.Module:
    torch.manual_seed(0)
    model = build_resnet(arch, 10, pretrained=False)
    return model.to(config.device, memory_format=memory_format(config.device))


def measure(function: Callable[[], Any], count: int, options: Options) -> dict[str, Any]:
    """Rate of `function`, which processes `count` things, its first call apart; the peak memory on CUDA.

    A function that returns a float has timed itself, to leave preparations out: the seconds that it took.
    """
    on_cuda, seconds = options.device.startswith("cuda"), []
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 + options.repeats):
        synchronize(options.device)
        started = time.perf_counter()
        own = function()
        synchronize(options.device)
        took = time.perf_counter() - started
        seconds.append(own if isinstance(own, float) else took)
    rates = [count / each for each in seconds[1:]]
    record = {"rate": median(rates), "min": min(rates), "max": max(rates), "n": len(rates), "first_seconds": seconds[0]}
    return record | ({"peak_bytes": torch.cuda.max_memory_allocated()} if on_cuda else {})


def records(variants: Variants) -> Iterator[tuple[str, dict[str, Any]]]:
    """The record of each variant, or the error that prevented it."""
    for name, variant in variants.items():
        print(f"  {name}", file=sys.stderr)
        gc.collect()
        torch._dynamo.reset()  # so that nothing is left from the variant before
        try:
            record = variant()
        except Exception as error:
            record = {"error": f"{type(error).__name__}: {first_line(error)}"}
        yield name, record


def smoke(options: Options) -> Variants:
    """Whether imports, training in each way, prediction and torch.compile work at all, in 20 seconds."""

    def imports() -> dict[str, Any]:
        names = ["pytest", "xdist"]
        for package in ("engine", "report", "experiments"):
            names += [f"{package}.{path.stem}" for path in sorted((ROOT / package).glob("*.py"))]
        for name in (*names, "config", "evaluate"):
            importlib.import_module(name)
        return {"modules": len(names)}

    def train(network: nn.Module | None = None, **changes: Any) -> dict[str, Any]:
        config = configure(options, **changes)
        network = network or make_model("resnet18", config)
        history = fit_recipe(network.to(config.device), RECIPE, config, random_dataset(config, 3), cross_entropy)
        return {"loss": history[-1]["loss"]}

    def prediction() -> dict[str, Any]:
        config = configure(options)
        model, images = make_model("resnet18", config), random_dataset(config, 1).train.images[:8]
        found = predict(model, images, config.image_size).cpu()
        expected = predict(model.cpu(), images.cpu(), config.image_size)
        return {"relative_difference_from_cpu": ((found - expected).norm() / expected.norm()).item()}

    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    return {
        "imports": imports,
        "fit, deterministic": partial(train, deterministic=True),  # first: cuBLAS reads its setting only once
        "fit, bf16": train,
        "fit, fp32": partial(train, precision="fp32"),
        "predict": prediction,
        "fit, compiled": partial(train, nn.Sequential(*layers), compile="on"),
    }


def ceilings(options: Options) -> Variants:
    """The rates that bound everything else: of a copy, and of a matrix product in bfloat16."""
    side, size = (8192, 2**32) if options.device.startswith("cuda") else (512, 2**24)

    def repeat(function: Callable[[], Any], count: int) -> dict[str, Any]:  # one alone takes a millisecond or two
        return measure(lambda: [function() for _ in range(20)][:0], 20 * count, options)

    def copy() -> dict[str, Any]:
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=options.device)
        target = torch.empty_like(source)
        return repeat(lambda: target.copy_(source), 2 * size)

    def product() -> dict[str, Any]:
        a, b = torch.randn(2, side, side, device=options.device, dtype=torch.bfloat16)
        into = torch.empty_like(a)
        return repeat(lambda: torch.mm(a, b, out=into), 2 * side**3)

    return {"copy, bytes/s": copy, "matrix product, FLOP/s": product}


def device_tests(options: Options) -> Variants:
    """The tests that take a device, on this one; each outcome is in FOLDER/tests-*.log as it comes."""

    def run(folder: str) -> dict[str, Any]:
        started, log = time.perf_counter(), ROOT / options.folder / f"tests-{folder}.log"
        select = "cuda" if options.device.startswith("cuda") else "cpu and test_inference"
        words = [sys.executable, "-m", "pytest", "-vv", "-n", "auto", "--dist", "loadfile", "-p", "no:cacheprovider"]
        with open(log, "w") as file:
            command = [*words, "-k", select, f"tests/{folder}"]
            status = subprocess.call(command, cwd=ROOT, stdout=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
        lines = log.read_text().splitlines()
        counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", lines[-1])}
        counts["errors"] = counts.pop("error", 0) + counts.get("errors", 0)
        if status not in (0, 1) or not counts:
            raise RuntimeError(f"pytest: exit status {status}, see {log}")
        failures = [line for line in lines if re.match("(FAILED|ERROR) ", line)]
        return {"seconds": time.perf_counter() - started, **counts, "failures": failures}

    folders = ("unit", "end_to_end") if options.device.startswith("cuda") else ("unit",)
    return {folder: partial(run, folder) for folder in folders}


def exact_resize(options: Options) -> Variants:
    """Values of resized images that differ from PIL's, and how far prepared images are from the same on the CPU."""

    def resized(before: int, after: int) -> dict[str, Any]:
        images = np.random.default_rng(0).integers(0, 256, (20, before, before, 3), dtype=np.uint8)
        ours = resize(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(options.device), after)
        by_pil = [
            np.asarray(Image.fromarray(image).resize((after, after), Image.Resampling.BILINEAR)) for image in images
        ]
        different = ours.cpu().permute(0, 2, 3, 1).numpy() != np.stack(by_pil)
        return {"values": different.size, "different": int(different.sum())}

    def normalised() -> dict[str, Any]:
        images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 3, 32, 32), dtype=np.uint8))
        there, here = prepare(images.to(options.device), 224).cpu(), prepare(images, 224)
        return {"largest_difference": (there - here).abs().max().item()}

    sizes = ((32, 33), (32, 64), (32, 224), (32, 299), (224, 32), (500, 224))
    return {f"{a} to {b} px": partial(resized, a, b) for a, b in sizes} | {"normalised": normalised}


def stored_against_online(options: Options) -> Variants:
    """The teacher's stored logits against those that it gives on the student's batches."""
    return {"resnet50": partial(compare_logits, options)}


def compare_logits(options: Options) -> dict[str, Any]:
    config = configure(options)
    dataset, model = random_dataset(config, options.steps), make_model("resnet50", config)
    fit_recipe(model, RECIPE, config, dataset, cross_entropy)
    model.eval()
    subset = dataset.subset(None)
    stored = stored_logits(teacher_logits(Teacher("teacher", model, ""), config, dataset, subset))
    online = OnlineTeacher(model, config)
    pairs = [(stored(b), online(b)) for b in batches(dataset.train, subset, config, 0, 0)]
    first, second = (torch.cat(side).float().cpu().numpy() for side in zip(*pairs, strict=True))
    return {
        "images": len(first),
        "largest_difference": float(np.abs(first - second).max()),
        "standard_deviation_of_logits": float(first.std()),
        "same_class": float((first.argmax(1) == second.argmax(1)).mean()),
        "kl_at_temperature_5": kl_divergence(first, second, 5.0),
    }


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.cpu() for tensor in model.state_dict().values()]


def exact_resume(options: Options) -> Variants:
    """Whether training with --deterministic repeats, and resumes, bit for bit, and what it costs."""

    def run(deterministic: bool) -> dict[str, Any]:
        config = configure(options, deterministic=deterministic)
        dataset = random_dataset(config, options.steps)

        def train(stop_after: int | None = None, state: dict | None = None) -> tuple:
            model, states, calls = make_model("resnet18", config), [], iter(range(10**9))
            more = {"state": state, "write": states.append, "stop": lambda: 15 * (next(calls) + 1 == stop_after)}
            history = fit_recipe(model, RECIPE, config, dataset, cross_entropy, **more)
            return model, states, history

        once, twice = train()[0], train()[0]
        state = train(options.steps // 2)[1][0]
        resumed = train(state=state)[0]
        return {
            "repeats": all(map(torch.equal, weights(once), weights(twice))),
            "resumes": all(map(torch.equal, weights(once), weights(resumed))),
            "stopped_at_step": state["step"],
            **measure(lambda: train()[2][-1]["seconds"], len(dataset.train.labels), options),
        }

    # "deterministic" first: cuBLAS reads its setting only once
    return {"deterministic": partial(run, True), "default": partial(run, False)}


class Step:
    """A training step without anything around it, in one of the ways that PyTorch offers."""

    def __init__(self, arch: str, config: Config, fused: bool = True, compile: str | None = None, graph: bool = False):
        self.config, self.graph = config, graph
        self.model = make_model(arch, config).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.001, 0.9, fused=fused or None)  # None: foreach
        self.forward = torch.compile(self.model, mode=compile) if compile else self.model
        dataset = random_dataset(config, 1)
        self.images, self.labels = prepare(dataset.train.images, config.image_size), dataset.train.labels
        self.replay: Callable[[], Any] = self.step
        if graph:
            self.capture()

    def step(self) -> None:
        self.optimizer.zero_grad()
        kind = torch.device(self.config.device).type
        enabled = self.config.precision == "bf16"
        with torch.autocast(kind, torch.bfloat16, enabled, cache_enabled=not self.graph):  # a graph outlives the cache
            logits = self.forward(self.images)
        F.cross_entropy(logits.float(), self.labels).backward()
        self.optimizer.step()

    def capture(self) -> None:
        """Record the step as a CUDA graph, after a warm-up on a side stream, as PyTorch's notes prescribe."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()
        with torch.cuda.graph(graph):
            self.step()
        self.replay = graph.replay

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.replay()


def bare_step(options: Options, arch: str, precision: str = "bf16", tf32: bool = True, **how: Any) -> dict[str, Any]:
    """Training images/s of Step."""
    config = configure(options, precision=precision)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    started = time.perf_counter()
    step = Step(arch, config, **how)
    prepared = time.perf_counter() - started  # with a graph, it has been captured by now, and compiled before
    record = measure(lambda: step.run(options.steps), options.batch_size * options.steps, options)
    record["first_seconds"] += prepared
    if step.graph:
        record.pop("peak_bytes", None)  # of replays, which allocate nothing
    return record


def whole_fit(
    options: Options, arch: str, teacher: str = "none", on_host: bool = False, **changes: Any
) -> dict[str, Any]:
    """Training images/s of `fit`, with its input, meter and schedule; distilled from "stored" or "online" logits."""
    config = configure(options, **changes)
    dataset, model = random_dataset(config, options.steps, on_host), make_model(arch, config)
    loss: LossFunction = cross_entropy
    if teacher == "stored":
        logits = torch.randn(2, len(dataset.train.labels), 10, device=config.device)
        loss = Distillation(Recipe(teacher="teacher"), stored_logits(logits))
    elif teacher == "online":
        loss = Distillation(Recipe(teacher="teacher"), OnlineTeacher(make_model("resnet50", config).eval(), config))

    def epoch() -> float:
        return fit_recipe(model, RECIPE, config, dataset, loss)[-1]["seconds"]

    return measure(epoch, len(dataset.train.labels), options)


def estimated(options: Options, arch: str) -> dict[str, Any]:
    """Training images/s as the scripts estimate them before a run."""
    config, started = configure(options), time.perf_counter()
    (seconds,) = time_training([Architecture(arch, "imagenet")], config, random_dataset(config, 1), ["bf16"]).values()
    took = time.perf_counter() - started
    return {"rate": 1 / seconds, "min": 1 / seconds, "max": 1 / seconds, "n": 1, "first_seconds": took}


def for_each_arch(ways: dict[str, tuple], options: Options) -> Variants:
    return {
        f"{arch}: {way}": partial(function, options, arch, **how)
        for way, (function, how) in ways.items()
        for arch in ARCHS
    }


def training_speed(options: Options) -> Variants:
    """Training images/s of `fit`: plain, distilled, and with each augmentation."""
    ways: dict[str, dict[str, Any]] = {
        "distilled, stored logits": {"teacher": "stored"},
        "shifted": {"crop_padding": 4},
        "crop": {"augment": "crop"},
        "randomerasing": {"augment": "randomerasing"},
        "distilled, online teacher": {"teacher": "online"},
        "trivialaugment": {"augment": "trivialaugment"},
    }
    plain = for_each_arch({"fit": (whole_fit, {})}, options)
    return plain | {
        f"resnet18: fit, {way}": partial(whole_fit, options, "resnet18", **how) for way, how in ways.items()
    }


def step_speed(options: Options) -> Variants:
    """Training images/s of a bare step in several ways, of images in host memory, and as estimated before a run."""
    return for_each_arch(
        {
            "fit, as estimated before a run": (estimated, {}),
            "fit, images in pinned host memory": (whole_fit, {"on_host": True}),
            "step": (bare_step, {}),
            "step, optimizer not fused": (bare_step, {"fused": False}),
            "step, float32 in TF32": (bare_step, {"precision": "fp32"}),
            "step, float32": (bare_step, {"precision": "fp32", "tf32": False}),
            "step, CUDA graph": (bare_step, {"graph": True}),
        },
        options,
    )


def compiled_speed(options: Options) -> Variants:
    """Training images/s with torch.compile; the first call compiles without a cache."""

    def without_cache(function: Callable[..., dict], *arguments: Any, **how: Any) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
            return function(*arguments, **how)

    fit, step = partial(without_cache, whole_fit), partial(without_cache, bare_step)
    return for_each_arch(
        {
            "fit, compiled": (fit, {"compile": "on"}),
            "step, compiled, reduce-overhead": (step, {"compile": "reduce-overhead"}),
            "step, compiled, CUDA graph": (step, {"compile": "default", "graph": True}),
        },
        options,
    )


def evaluation_speed(options: Options) -> Variants:
    """Images/s of `predict` by the size of its batches, which is 500 in the product."""

    def at(arch: str, batch_size: int) -> dict[str, Any]:
        config = configure(options)
        dataset, model = random_dataset(config, 4 * options.steps), make_model(arch, config)
        images = dataset.train.images
        return measure(
            lambda: predict(model, images, config.image_size, config.precision, batch_size), len(images), options
        )

    return {f"{arch}: batches of {b:,}": partial(at, arch, b) for b in (500, 100, 1000, 2000) for arch in ARCHS}


KERNELS = {  # kind -> a pattern of the kernels' names, the first that matches counts
    "optimizer": r"multi_tensor|sgd|adam",
    "BatchNorm": r"batch_?norm|bn_(fw|bw)|welford",
    "pooling": r"pool",
    "convolution and matrix product": r"conv|gemm|cutlass|xmma|nvjet|wgrad|dgrad|cudnn|nchwToNhwc|nhwcToNchw",
    "copy and cast": r"copy|memcpy|memset",
    "reduction": r"reduce",
    "elementwise": r"elementwise|relu|threshold|where",
}


def step_profile(options: Options) -> Variants:
    """Where the time of a step of `fit` goes: each kind of kernel's share of it, and of the gaps between kernels."""
    on_cuda = options.device.startswith("cuda")

    def run(arch: str) -> dict[str, Any]:
        config = configure(options)
        dataset, model = random_dataset(config, options.steps), make_model(arch, config)
        fit_recipe(model, RECIPE, config, dataset, cross_entropy)
        synchronize(config.device)
        with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as recorded:
            wall = fit_recipe(model, RECIPE, config, dataset, cross_entropy)[-1]["seconds"]
            synchronize(config.device)
        seconds, names = defaultdict(float), Counter()
        for event in recorded.key_averages():
            if getattr(event, "is_user_annotation", False):  # spans kernels that are counted themselves
                continue
            took = (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1e6
            kinds = (kind for kind, pattern in KERNELS.items() if re.search(pattern, event.key, re.IGNORECASE))
            seconds[next(kinds, "other")] += took
            names[event.key[:120]] += took
        shares = {kind: took / wall for kind, took in seconds.items()}
        shares["gaps between kernels"] = max(0.0, 1 - sum(shares.values()))
        longest = {name: took / wall for name, took in names.most_common(12)}
        return {"step_milliseconds": 1e3 * wall / options.steps, "shares": shares, "longest": longest}

    return {arch: partial(run, arch) for arch in ARCHS}


def synchronisations(options: Options) -> Variants:
    """Where `fit` makes the host wait for the device, and how often in an epoch of `steps` steps."""

    def run(**changes: Any) -> dict[str, Any]:
        config = configure(options, **changes)
        dataset, model, places = random_dataset(config, options.steps), make_model("resnet18", config), Counter()
        fit_recipe(model, RECIPE, config, dataset, cross_entropy)
        on_cuda = options.device.startswith("cuda")
        if on_cuda:
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit_recipe(model, RECIPE, config, dataset, cross_entropy)
        if on_cuda:
            torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if "synchroniz" in str(warning.message):
                places[f"{Path(warning.filename).name}:{warning.lineno}"] += 1
        return {"steps": options.steps, "places": dict(places)}

    ways = {"plain": {}, "shifted": {"crop_padding": 4}, "crop": {"augment": "crop"}}
    ways |= {name: {"augment": name} for name in ("randomerasing", "trivialaugment")}
    return {name: partial(run, **changes) for name, changes in ways.items()}


def original_way(options: Options) -> Variants:
    """benchmarks.speed: the original's way and this one, in alternation."""
    return {"benchmarks.speed": partial(run_benchmark, options)}


def run_benchmark(options: Options) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "benchmark.json")
        flags = {"device": options.device, "image_size": options.image_size, "batch_size": options.batch_size}
        flags |= {"steps": options.steps, "rounds": options.repeats, "seconds": 15, "json": path}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "-m", "benchmarks.speed", *words], cwd=ROOT, check=True, stdout=sys.stderr)
        return json.loads(path.read_text())


def experiment(options: Options) -> Variants:
    """The whole experiment from beginning to end: wall time of each script, and of each model's epochs."""
    return {"experiment": partial(run_experiment, options)}


def run_experiment(options: Options) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        flags = [*options.experiment.split(), "--device", options.device, "--checkpoints_path", f"{folder}/checkpoints"]
        flags += ["--imgs_path", f"{folder}/imgs"]
        walls = {}
        for script in ("teacher_student_model.py", "evaluate.py"):
            started = time.perf_counter()
            subprocess.run([sys.executable, script, *flags], cwd=ROOT, check=True, stdout=sys.stderr)
            walls[script] = time.perf_counter() - started
        results = json.loads(next(Path(folder).rglob("results.json")).read_text())
        states = [load_checkpoint(path) for path in sorted(Path(folder).rglob("checkpoints/*/seed*/*.pt"))]
    trained = [state for state in states if "history" in state]
    models = {
        f"{state['name']}/seed{state['seed']}": {
            "seconds": sum(record["seconds"] for record in state["history"]),
            "first_epoch": state["history"][0]["seconds"],
            "last_epoch": state["history"][-1]["seconds"],
        }
        for state in trained
    }
    accuracies = {name: model["accuracy"]["mean"] for name, model in results["models"].items()}
    return {
        "flags": options.experiment,
        "wall_seconds": walls,
        "training_seconds": sum(model["seconds"] for model in models.values()),
        "models": models,
        "accuracies": accuracies,
        "n_test": results["n_test"],
        "comparisons": [
            {k: c[k] for k in ("model", "baseline", "difference", "verdict")} for c in results["comparisons"]
        ],
        "environment": results["environment"],
    }


class Section(NamedTuple):
    variants: Callable[[Options], Variants]
    seconds: int  # after which it is stopped


SECTIONS = {  # what tells most in the shortest time comes first
    function.__name__: Section(function, seconds)
    for function, seconds in (
        *((smoke, 60), (device_tests, 150), (exact_resume, 60), (step_profile, 60), (synchronisations, 45)),
        *((ceilings, 30), (training_speed, 150), (stored_against_online, 45), (exact_resize, 45)),
        *((evaluation_speed, 120), (step_speed, 240), (compiled_speed, 600), (experiment, 1200), (original_way, 900)),
    )
}
