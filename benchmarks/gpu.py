"""Measure this repository on a GPU: tests, exactness, speed and the whole experiment, into a JSON file and a page.

    python -m benchmarks.gpu --only smoke device_tests --deadline 120 --folder imgs/gpu
    python -m benchmarks.gpu --dataset path/to/images       # everything, into docs/gpu.json and docs/gpu.md
    python -m benchmarks.gpu --device cpu                   # a rehearsal at a small size; imgs/gpu/

Nothing is installed or downloaded. Each section runs in a process of its own, for a limited time. Both files are
written after each of its variants; the same command goes on with those that are missing or have failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import config
from benchmarks import STARTED
from benchmarks.gpu_measurements import ROOT, SECTIONS, Options, configure, records
from benchmarks.speed import H200_BYTES_PER_SECOND, H200_ROOFLINE
from engine.console import exit_on_signal, handle_signals
from engine.datasets import load_dataset
from engine.device import environment
from engine.errors import UserError, exit_on_error
from engine.files import write_durably

SHARE_OF_ROOFLINE = 0.6
DISTILLED_OVER_PLAIN, AUGMENTED_OVER_PLAIN = 1.05, 1.10
FROM_RANDOM_WEIGHTS = (f"--{name}.pretrained False" for name in config.ORIGINAL)
MEASUREMENT = {
    **{"image_size": 224, "batch_size": 100, "steps": 50, "repeats": 5, "folder": Path("docs")},
    "experiment": " ".join(["--preset original", *FROM_RANDOM_WEIGHTS]),
}
REHEARSAL = {
    **{"image_size": 32, "batch_size": 8, "steps": 4, "repeats": 2, "folder": Path("imgs/gpu")},
    "experiment": "--preset demo --seeds 0 --epochs 3 --train_size 50",
}
Found = dict[str, dict[str, dict[str, Any]]]  # section -> variant -> record


def row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(*rows: tuple) -> list[str]:
    head, *others = rows
    return [row(*head), row(":--", *["--:"] * (len(head) - 1)), *(row(*cells) for cells in others), ""]


def speed_rows(records: dict[str, Any]) -> list[tuple]:
    """A row for each variant of a table of speeds: median rate, range, first call, peak memory."""
    rows = [("", "images/s", "range", "n", "first call", "peak memory")]
    for name, record in records.items():
        peak = f"{record['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in record else ""
        spread = f"{record['min']:,.0f} to {record['max']:,.0f}"
        rows.append((name, f"{record['rate']:,.0f}", spread, record["n"], f"{record['first_seconds']:.1f} s", peak))
    return rows


def experiment_seconds(step: dict[str, float], evaluation: dict[str, float]) -> float:
    """Training of the original's models and the evaluations in between, by rates in images/s of each architecture.

    50,000 images are trained on and 10,000 evaluated an epoch; the teacher classifies 100,000 once.
    """
    seconds = 100_000 / evaluation["resnet50"]
    for recipe in config.ORIGINAL.values():
        seconds += recipe.epochs * (50_000 / step[recipe.arch] + 10_000 / evaluation[recipe.arch])
    return seconds


def targets(found: Found, image_size: int) -> list[str]:
    """The targets beside what was measured; the roofline and the whole experiment are those of 224 px."""
    rows: list[tuple] = [("", "target", "here")]
    rates = {name: record["rate"] for name, record in found.get("training_speed", {}).items()}
    copy = found.get("ceilings", {}).get("copy, bytes/s", {}).get("rate")
    step = {arch: rates[f"{arch}: fit"] for arch in ("resnet50", "resnet18") if f"{arch}: fit" in rates}
    for name, roof in H200_ROOFLINE.items():
        rate = step.get(name.split()[0].lower())
        if rate and copy and image_size == 224:
            share = rate / (roof * copy / H200_BYTES_PER_SECOND)
            rows.append((f"{name}, share of the roofline", f"{SHARE_OF_ROOFLINE:.0%} or more", f"{share:.0%}"))
    for name, rate in rates.items():
        way = name.removeprefix("resnet18: fit, ")
        if way != name and "resnet18" in step:
            target = {"distilled, stored logits": DISTILLED_OVER_PLAIN}.get(way, AUGMENTED_OVER_PLAIN)
            limit = f"{target:.2f} or less"
            if way in ("trivialaugment", "distilled, online teacher"):
                limit = ""  # which do more by design
            rows.append((f"ResNet18's step, {way}, over a plain one", limit, f"{step['resnet18'] / rate:.3f}"))
    if len(step) == 2 and image_size == 224:
        measured = found.get("evaluation_speed", {})
        evaluation = {a: measured.get(f"{a}: batches of 500", {"rate": 3 * step[a]})["rate"] for a in step}
        minutes = f"{experiment_seconds(step, evaluation) / 60:.1f}"
        rows.append(("the whole experiment's minutes, computed from these rates", "", minutes))
    for way, record in found.get("synchronisations", {}).items():
        name = f"synchronisations in an epoch of {record['steps']} steps, {way}"
        rows.append((name, "few", str(sum(record["places"].values()))))
    return table(*rows)


def exactness(found: Found) -> list[str]:
    lines = []
    for name, record in found.get("smoke", {}).items():
        lines.append(f"- Smoke test, {name}: " + ", ".join(f"{what} {value:.4g}" for what, value in record.items()))
    for folder, record in found.get("device_tests", {}).items():
        counts = [f"{record[what]} {what}" for what in ("passed", "failed", "errors", "skipped") if what in record]
        lines.append(f"- Tests on the device, {folder}: {', '.join(counts)}, in {record['seconds']:.0f} s.")
        lines += [f"  - `{failure}`" for failure in record["failures"]]
    for name, record in found.get("exact_resume", {}).items():
        lines.append(
            f"- ResNet18, {name}: repeats bit for bit: {record['repeats']}; resumes bit for bit: {record['resumes']}; "
            f"{record['rate']:,.0f} images/s."
        )
    for arch, record in found.get("stored_against_online", {}).items():
        lines.append(
            f"- Stored against online logits of a {arch} ({record['images']:,} images): at most "
            f"{record['largest_difference']:.2g} apart, of logits with standard deviation "
            f"{record['standard_deviation_of_logits']:.2g}; the same class for {record['same_class']:.2%}; KL at T = 5 "
            f"{record['kl_at_temperature_5']:.1g} nats."
        )
    for name, record in found.get("exact_resize", {}).items():
        if "different" in record:
            lines.append(
                f"- Resized, {name}: {record['different']:,} of {record['values']:,} values differ from PIL's."
            )
        else:
            lines.append(f"- Normalised images differ from a CPU's by at most {record['largest_difference']:.1g}.")
    return [*lines, ""]


def page(written: dict[str, Any]) -> str:
    """The Markdown page of what gpu.json holds."""
    options, machine, sections = (written[name] for name in ("options", "environment", "sections"))
    succeeded = {s: {v: r for v, r in of.items() if "error" not in r} for s, of in sections.items()}
    found = {section: variants for section, variants in succeeded.items() if variants}
    lines = [f"# Measured on {machine['device']}", ""]
    lines += [f"`python -m benchmarks.gpu`: {options['image_size']} px, batches of {options['batch_size']}; "]
    lines[-1] += ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "torchvision")) + "."
    for name, record in found.get("ceilings", {}).items():
        lines += [f"This machine reaches {record['rate']:.3g} in a {name}."]
    lines += ["", "## Targets", "", *targets(found, options["image_size"]), "## Exactness", "", *exactness(found)]
    for section in ("training_speed", "step_speed", "compiled_speed", "evaluation_speed"):
        if section in found:
            lines += [f"## {section.replace('_', ' ').capitalize()}", "", *table(*speed_rows(found[section]))]
    if profiles := found.get("step_profile"):
        kinds = sorted({kind for record in profiles.values() for kind in record["shares"]})
        rows = [(kind, *(f"{r['shares'].get(kind, 0):.1%}" for r in profiles.values())) for kind in kinds]
        milliseconds = ("a step, milliseconds", *(f"{r['step_milliseconds']:.2f}" for r in profiles.values()))
        lines += ["## Where a step's time goes", "", *table(("", *profiles), *rows, milliseconds)]
    for way, record in found.get("synchronisations", {}).items():
        if record["places"]:
            places = ", ".join(f"{place} ({n})" for place, n in record["places"].items())
            lines += [f"Synchronisations, {way}: {places}.", ""]
    for record in found.get("experiment", {}).values():
        walls = ", ".join(f"{script} {seconds:.0f} s" for script, seconds in record["wall_seconds"].items())
        rows = [
            (name, *(f"{m[k]:.1f} s" for k in ("seconds", "first_epoch", "last_epoch")))
            for name, m in record["models"].items()
        ]
        accuracies = ", ".join(f"{name} {100 * value:.2f}%" for name, value in record["accuracies"].items())
        lines += ["## The whole experiment", "", f"`{record['flags']}`: {walls}. Test accuracy: {accuracies}.", ""]
        lines += table(("", "training", "first epoch", "last epoch"), *rows)
    for record in found.get("original_way", {}).values():
        rows = [(pair["ours"], pair["plain"], f"{pair['ratio']:.1f}") for pair in record["ratios"]]
        lines += ["## Against the original's way", "", *table(("here", "against", "times faster"), *rows)]
    failures = [f"{s}, {v}: {r['error']}" for s, of in sections.items() for v, r in of.items() if "error" in r]
    failures += [f"{section}: {why}" for section, why in written["stopped"].items()]
    if failures:
        lines += ["## Failed", "", *(f"- {failure}" for failure in failures), ""]
    return "\n".join(lines).strip() + "\n"


def missing(name: str, options: Options, written: dict[str, Any]) -> list[str]:
    """The variants of a section that have not succeeded yet."""
    found = written["sections"].get(name, {})
    return [variant for variant in SECTIONS[name].variants(options) if "error" in found.get(variant, {"error": ""})]


def run_section(
    name: str, variants: list[str], options: Options, seconds: float, record: Callable[[str, Any], None]
) -> str:
    """Run variants in a process of their own and `record` each. Returns why they ended too early, if they did."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--section", name, json.dumps(variants)]
    words.append(json.dumps(options._asdict()))
    too_long = threading.Event()
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=os.setpgrp)

    def end() -> None:
        too_long.set()
        os.killpg(process.pid, signal.SIGKILL)  # with all that it has started

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        for line in process.stdout or ():
            record(*json.loads(line))
        process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            end()
    if too_long.is_set():
        return f"stopped after {seconds:.0f} s"
    return f"exit status {process.returncode}; its traceback is above" if process.returncode else ""


def run_sections(names: list[str], options: Options, deadline: float) -> dict[str, Any]:
    """Run what gpu.json lacks until `deadline`, a time of time.monotonic; returns what it holds then."""
    path = Path(options.folder, "gpu.json")
    now = {"options": options._asdict(), "environment": environment(configure(options))}
    written = json.loads(path.read_text()) if path.exists() else {**now, "sections": {}, "stopped": {}}
    for what in now:
        if written[what] != now[what]:
            raise UserError(f"{path}: was measured with other {what}; delete it, or write to another --folder")

    def save() -> None:
        write_durably(path, (json.dumps(written, indent=1) + "\n").encode())
        write_durably(path.with_suffix(".md"), page(written).encode())

    save()
    for name in names:
        left, variants = deadline - time.monotonic(), missing(name, options, written)
        written["stopped"].pop(name, None)
        if variants and left < 5:
            written["stopped"][name] = "not started, for lack of time"
        elif variants:
            print(f"{name}: {(SECTIONS[name].variants.__doc__ or '').splitlines()[0]}", file=sys.stderr)
            started, found = time.monotonic(), written["sections"].setdefault(name, {})

            def record(variant: str, result: dict[str, Any], found: dict[str, Any] = found) -> None:
                found[variant] = result
                save()

            limit = SECTIONS[name].seconds * (1 if options.device.startswith("cuda") else 5)
            error = run_section(name, variants, options, min(left, limit), record)
            if error:
                written["stopped"][name] = f"{error}; missing: {', '.join(missing(name, options, written))}"
            print(f"{name}: {error or f'{time.monotonic() - started:.0f} s'}", file=sys.stderr)
        save()
    return written


def check_data(flags: str) -> None:
    """Raise UserError if the images of the experiment are not here; nothing is downloaded."""
    with mock.patch("urllib.request.urlopen", side_effect=OSError("this benchmark downloads nothing")):
        load_dataset(config.parse([*flags.split(), "--device", "cpu"]))


def measure_in_this_process(name: str, variants: list[str], options: Options) -> None:
    """Print the records of variants, as JSON, line by line; what else is printed goes to stderr."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    found = SECTIONS[name].variants(options)
    for record in records({variant: found[variant] for variant in variants}):
        print(json.dumps(record), file=out)


def main() -> None:
    if sys.argv[1:2] == ["--section"]:
        measure_in_this_process(sys.argv[2], json.loads(sys.argv[3]), Options(**json.loads(sys.argv[4])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--image_size", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--steps", type=int, help="of each measurement of speed")
    parser.add_argument("--repeats", type=int, help="of each measurement of speed")
    parser.add_argument("--dataset", default="cifar10", help="of the whole experiment")
    parser.add_argument("--experiment", help="flags of the whole experiment; the original's, from random weights")
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--folder", type=Path, help="of gpu.json and gpu.md")
    parser.add_argument("--deadline", type=float, default=float("inf"), metavar="SECONDS", help="after which it ends")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    words = argparse.Namespace(**{**(REHEARSAL if given["device"] == "cpu" else MEASUREMENT), **given})
    with exit_on_error(), handle_signals(exit_on_signal, "SIGTERM", "SIGHUP"):
        flags = f"{words.experiment} --dataset {words.dataset} --image_size {words.image_size}"
        flags = words.experiment if words.device == "cpu" else f"{flags} --batch_size {words.batch_size}"
        if "experiment" in words.only:
            check_data(flags)
        sizes = (words.image_size, words.batch_size, words.steps, words.repeats)
        options = Options(words.device, *sizes, flags, str(words.folder))
        written = run_sections(words.only, options, STARTED + words.deadline)
    print(words.folder / "gpu.md")
    raise SystemExit(1 if "## Failed" in page(written) else 0)


if __name__ == "__main__":
    main()
