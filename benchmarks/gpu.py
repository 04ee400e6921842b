"""Measure this repository on a GPU: exactness, speed and the whole experiment, into a JSON file and a Markdown page.

    python -m benchmarks.gpu                  # about 25 minutes on one H200; docs/gpu.json and docs/gpu.md
    python -m benchmarks.gpu --dataset path/to/images --only experiment training_speed
    python -m benchmarks.gpu --device cpu     # a rehearsal at a small size, with the demo as the experiment; imgs/gpu/

Each section runs in a process of its own and is written as soon as it is finished; the same command goes on with those
that are missing or have failed. The page is written from the JSON file each time.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_measurements import ROOT, SECTIONS, Options, configure
from benchmarks.speed import H200_ROOFLINE
from engine.device import environment
from engine.errors import UserError, exit_on_error
from engine.files import write_durably

TARGETS = {  # images/s on an H200 at 224 px, batches of 100
    "ResNet50 training": 4_800,
    "ResNet18 training": 14_000,
    "ResNet50 evaluation": 15_000,
}
EXPERIMENT_SECONDS = 110
FROM_RANDOM_WEIGHTS = (f"--{name}.pretrained False" for name in ("teacher", "student", "student_10", "student_kd"))
MEASUREMENT = {
    **{"image_size": 224, "batch_size": 100, "steps": 50, "repeats": 5, "folder": Path("docs")},
    "experiment": " ".join(["--preset original", *FROM_RANDOM_WEIGHTS]),
}
REHEARSAL = {
    **{"image_size": 32, "batch_size": 8, "steps": 4, "repeats": 2, "folder": Path("imgs/gpu")},
    "experiment": "--preset demo --seeds 0",
}


def row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(*rows: tuple) -> list[str]:
    head, *others = rows
    return [row(*head), row(":--", *["--:"] * (len(head) - 1)), *(row(*cells) for cells in others), ""]


def speed_rows(records: dict[str, Any]) -> list[tuple]:
    """A row for each variant of a table of speeds: median rate, range, first call, peak memory."""
    rows = [("", "images/s", "range", "n", "first call", "peak memory")]
    for name, record in records.items():
        if "error" in record:
            rows.append((name, record["error"].replace("|", "/")[:80], "", "", "", ""))
            continue
        peak = f"{record['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in record else ""
        spread = f"{record['min']:,.0f} to {record['max']:,.0f}"
        rows.append((name, f"{record['rate']:,.0f}", spread, record["n"], f"{record['first_seconds']:.1f} s", peak))
    return rows


def targets(found: dict[str, Any]) -> list[str]:
    """The targets beside what was measured."""
    rows, training, evaluation = [], found.get("training_speed", {}), found.get("evaluation_speed", {})
    records = {
        "ResNet50 training": training.get("resnet50: fit", {}),
        "ResNet18 training": training.get("resnet18: fit", {}),
        "ResNet50 evaluation": evaluation.get("resnet50: batches of 500", {}),
    }
    for name, target in TARGETS.items():
        if rate := records[name].get("rate"):
            on_h200 = "H200" in found.get("ceilings", {}).get("environment", {}).get("device", "")
            roof = f"{rate / H200_ROOFLINE[name]:.0%}" if on_h200 and name in H200_ROOFLINE else ""
            rows.append((f"{name}, images/s", f"{target:,}", f"{rate:,.0f}", roof))
    if benchmark := found.get("original_way"):
        rows.append(("distilled epoch over plain epoch", "1.05", f"{benchmark['distilled_over_plain_epoch']:.3f}", ""))
    if experiment := found.get("experiment"):
        rows.append(
            (
                "training of the whole experiment",
                f"{EXPERIMENT_SECONDS} s",
                f"{experiment['training_seconds']:.0f} s",
                "",
            )
        )
    if synchronisations := found.get("synchronisations"):
        places, steps = synchronisations["places"], synchronisations["steps"]
        rows.append((f"synchronisations in an epoch of {steps} steps", "few", str(sum(places.values())), ""))
    return table(("", "target (H200, 224 px)", "here", "of the roofline"), *rows)


def exactness(found: dict[str, Any]) -> list[str]:
    lines = []
    if resized := found.get("exact_resize"):
        sizes = "; ".join(f"{sizes}: {n['different']:,} of {n['values']:,}" for sizes, n in resized["sizes"].items())
        largest = resized["normalised_largest_difference"]
        lines.append(
            f"- Values of resized images that differ from PIL's: {sizes}. Normalised: at most {largest:.1g} apart."
        )
    if stored := found.get("stored_against_online"):
        lines.append(
            f"- Stored against online logits of a ResNet50 ({stored['images']:,} images): at most "
            f"{stored['largest_difference']:.2g} apart, of logits with standard deviation "
            f"{stored['standard_deviation_of_logits']:.2g}; the same class for {stored['same_class']:.2%}; KL at T = 5 "
            f"{stored['kl_at_temperature_5']:.1g} nats."
        )
    for name, record in found.get("exact_resume", {}).items():
        lines.append(
            f"- ResNet18, {name}: repeats bit for bit: {record['repeats']}; resumes bit for bit: {record['resumes']}; "
            f"{record['rate']:,.0f} images/s."
        )
    if suite := found.get("suite"):
        counts = ", ".join(
            f"{suite[what]} {what}" for what in ("passed", "failed", "error", "skipped") if what in suite
        )
        lines.append(
            f"- Tests, on the device too: {counts}, in {suite['seconds']:.0f} s. {' '.join(suite['failures'])}".rstrip()
        )
    return [*lines, ""]


def page(found: dict[str, Any], options: dict[str, Any]) -> str:
    """The Markdown page."""
    about = f"{options['image_size']} px, batches of {options['batch_size']}"
    machine = found.get("ceilings", {}).get("environment", {})
    lines = ["# Measured on " + machine.get("device", options["device"]), "", f"`python -m benchmarks.gpu`: {about}; "]
    lines[-1] += ", ".join(f"{k} {machine[k]}" for k in ("python", "torch", "torchvision") if k in machine) + "."
    if rates := found.get("ceilings"):
        lines += [
            f"A copy moves {rates['bytes_per_second'] / 1e12:.2f} TB/s, a matrix product in bfloat16 computes "
            f"{rates['flop_per_second'] / 1e12:,.0f} TFLOP/s."
        ]
    lines += ["", "## Targets", "", *targets(found), "## Exactness", "", *exactness(found)]
    speeds = {"training_speed": "Training", "compiled_speed": "Training, compiled", "evaluation_speed": "Evaluation"}
    for section, title in speeds.items():
        if section in found:
            lines += [f"## {title}", "", *table(*speed_rows(found[section]))]
    if profiles := found.get("step_profile"):
        kinds = sorted({kind for record in profiles.values() for kind in record["shares"]})
        rows = [(kind, *(f"{r['shares'].get(kind, 0):.1%}" for r in profiles.values())) for kind in kinds]
        milliseconds = ("a step, milliseconds", *(f"{r['step_milliseconds']:.2f}" for r in profiles.values()))
        lines += ["## Where a step's time goes", "", *table(("", *profiles), *rows, milliseconds)]
    if places := found.get("synchronisations", {}).get("places"):
        lines += ["Synchronisations: " + ", ".join(f"{place} ({n})" for place, n in places.items()) + ".", ""]
    if experiment := found.get("experiment"):
        walls = ", ".join(f"{script} {seconds:.0f} s" for script, seconds in experiment["wall_seconds"].items())
        rows = [
            (name, *(f"{m[k]:.1f} s" for k in ("seconds", "first_epoch", "last_epoch")))
            for name, m in experiment["models"].items()
        ]
        accuracies = ", ".join(f"{name} {100 * value:.2f}%" for name, value in experiment["accuracies"].items())
        lines += ["## The whole experiment", "", f"`{experiment['flags']}`: {walls}. Test accuracy: {accuracies}.", ""]
        lines += table(("", "training", "first epoch", "last epoch"), *rows)
    if benchmark := found.get("original_way"):
        rows = [(pair["ours"], pair["plain"], f"{pair['ratio']:.1f}") for pair in benchmark["ratios"]]
        lines += ["## Against the original's way", "", *table(("here", "against", "times faster"), *rows)]
    if failed := found.get("failed"):
        lines += ["## Failed", "", *(f"- {name}: {error}" for name, error in failed.items()), ""]
    return "\n".join(lines).strip() + "\n"


def run_section(name: str, options: Options) -> tuple[dict[str, Any] | None, str]:
    """The section's record from a process of its own, or None and its error."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--section", name, json.dumps(options._asdict())]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return None, f"exit status {done.returncode}; its traceback is above"
    try:
        return json.loads(done.stdout.splitlines()[-1]), ""
    except (ValueError, IndexError):
        return None, "printed something after its record"


def run_sections(names: list[str], options: Options, path: Path) -> dict[str, Any]:
    """Every section that the JSON file lacks; the file is written after each."""
    now = {"options": options._asdict(), "environment": environment(configure(options))}
    written = json.loads(path.read_text()) if path.exists() else {**now, "sections": {}}
    for what in now:
        if written[what] != now[what]:
            raise UserError(f"{path}: was measured with other {what}; delete it, or write to another --folder")
    found = written["sections"]
    for name in names:
        if name in found and name not in found.get("failed", {}):
            continue
        print(f"{name}: {SECTIONS[name].__doc__.splitlines()[0]}", file=sys.stderr)
        started = time.perf_counter()
        record, error = run_section(name, options)
        failed = {**found.pop("failed", {}), name: error}
        if record is not None:
            found[name] = record
            del failed[name]
        if failed:
            found["failed"] = failed
        write_durably(path, (json.dumps(written, indent=1) + "\n").encode())
        print(f"{name}: {error or f'{time.perf_counter() - started:.0f} s'}", file=sys.stderr)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--section"]:
        print(json.dumps(SECTIONS[sys.argv[2]](Options(**json.loads(sys.argv[3])))))
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
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    words = argparse.Namespace(**{**(REHEARSAL if given["device"] == "cpu" else MEASUREMENT), **given})
    with exit_on_error():
        if words.device != "cpu" and not torch.cuda.is_available():
            raise UserError(f"device = {words.device}: this machine has no CUDA device; for a rehearsal: --device cpu")
        flags = f"{words.experiment} --dataset {words.dataset} --image_size {words.image_size}"
        flags = words.experiment if words.device == "cpu" else f"{flags} --batch_size {words.batch_size}"
        options = Options(words.device, words.image_size, words.batch_size, words.steps, words.repeats, flags)
        found = run_sections(words.only, options, words.folder / "gpu.json")
        write_durably(words.folder / "gpu.md", page(found, options._asdict()).encode())
    print(words.folder / "gpu.md")
    raise SystemExit(1 if "failed" in found else 0)


if __name__ == "__main__":
    main()
