"""The report's verdict on anybody's runs: each method against a baseline, over the seeds that both have.

python -m experiments.verdict results.csv                  # columns method,seed,accuracy, in percent or as fractions
python -m experiments.verdict results.csv --baseline alone --images 10000
python -m experiments.verdict predictions.npz              # `labels` (n,), and logits (n, C) named METHOD/seedS

The baseline is the first method of the file. Accuracies alone say nothing about the test images that two methods share,
so that `--images N` takes their errors as independent, which makes intervals too wide rather than too narrow. Without
it, the sampling of test images is not covered. Logits, such as those of a report's predictions.npz, are compared as
evaluate.py compares them.
"""

import argparse
import csv
import math
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.errors import UserError, exit_on_error
from engine.recipes import Recipe
from report.comparisons import Comparison, compare_all
from report.markdown import escape_markdown, interval, markdown_table, percent, verdict
from report.metrics import Evaluated
from report.statistics import detectable_over_seeds, half_width, holm, level_at_zero

Accuracies = dict[str, dict[int, float]]  # method -> seed -> accuracy, a fraction


def read_accuracies(path: Path) -> Accuracies:
    """Raises UserError, naming the line, for what is not a CSV file of method, seed and accuracy."""
    found: Accuracies = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if missing := {"method", "seed", "accuracy"} - {*(rows.fieldnames or ())}:
                raise UserError(f"{path}: has no column {', '.join(sorted(missing))}; must have method,seed,accuracy")
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                try:
                    method, seed, accuracy = row["method"], int(row["seed"]), float(row["accuracy"])
                except (TypeError, ValueError):
                    raise UserError(f"{where}: seed must be an integer, and accuracy a number") from None
                if not 0 <= accuracy <= 100:
                    raise UserError(f"{where}: accuracy = {accuracy:g}: must be from 0 to 1, or from 0 to 100")
                if seed in found.setdefault(method, {}):
                    raise UserError(f"{where}: {method} has seed {seed} twice")
                found[method][seed] = accuracy
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    percentages = {method: max(of_seeds.values()) > 1 for method, of_seeds in found.items()}
    if len(set(percentages.values())) > 1:
        fraction = next(method for method, is_percentage in percentages.items() if not is_percentage)
        raise UserError(f"{path}: {fraction} has accuracies up to 1 and others have some above; give all in percent")
    scale = 100 if all(percentages.values()) else 1
    return {method: {s: accuracy / scale for s, accuracy in of_seeds.items()} for method, of_seeds in found.items()}


def read_logits(path: Path) -> tuple[dict[str, Evaluated], np.ndarray]:
    """Raises UserError for what is not a file of labels and logits."""
    logits_of: dict[str, dict[int, np.ndarray]] = {}
    try:
        with np.load(path) as arrays:
            labels = arrays["labels"]
            if labels.ndim != 1 or labels.min() < 0:
                raise UserError(f"{path}: labels must be integers from 0, one for each image, not {labels.shape}")
            for key in arrays.files:
                if match := re.fullmatch(r"(?!validation/)(.+)/seed(\d+)", key):
                    logits, method = arrays[key], match[1]
                    if logits.ndim != 2 or len(logits) != len(labels) or labels.max() >= logits.shape[1]:
                        raise UserError(f"{path}: {key} must be logits ({len(labels)}, classes), not {logits.shape}")
                    if not np.isfinite(logits).all():
                        raise UserError(f"{path}: {key} has logits that are not finite")
                    logits_of.setdefault(method, {})[int(match[2])] = logits
    except KeyError:
        raise UserError(f"{path}: has no array labels") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return {method: Evaluated(Recipe(), by_seed, {}) for method, by_seed in logits_of.items()}, labels


def compare_accuracies(accuracies: Accuracies, baseline: str, images: int | None) -> list[Comparison]:
    """Each other method against the baseline. Raises UserError if they have fewer than two seeds in common."""
    found, methods = [], [method for method in accuracies if method != baseline]
    for method in methods:
        seeds = sorted(accuracies[method].keys() & accuracies[baseline].keys())
        if len(seeds) < 2:
            raise UserError(f"{method} and {baseline} have {len(seeds)} seeds in common; two or more are needed")
        first, second = (np.array([accuracies[name][seed] for seed in seeds]) for name in (method, baseline))
        differences = first - second
        mean, std, variance = float(differences.mean()), float(differences.std(ddof=1)), 0.0
        if images:
            shares = [(a.mean() * images + 1) / (images + 2) for a in (first, second)]  # never 0 or 1
            variance = sum(share * (1 - share) / images for share in shares)
            std = max(std, 1 / (images * math.sqrt(12)))  # that of rounding to whole images, as for logits
        elif np.ptp(differences) < 1e-9:
            raise UserError(
                f"{method} differs from {baseline} by the same in all seeds, which says nothing about other seeds; "
                "give accuracies with more digits, or the number of test images: --images N"
            )
        over_images = math.sqrt(variance)
        over_seeds = std / math.sqrt(len(seeds))
        half = half_width(0.05, over_images, over_seeds, len(seeds))
        p = level_at_zero(mean, over_images, over_seeds, len(seeds))
        found.append(
            Comparison(
                model=method,
                baseline=baseline,
                differs_in={},
                environments_differ=[],
                seeds=seeds,
                shared_teacher=False,
                difference=mean,
                std=std,
                ci95=(mean - half, mean + half),
                p_value=p,
                p_holm=p,
                test="paired over seeds" + (f", {images:,} test images as if independent" if images else ""),
                t_test_p=None,
                mcnemar_p={},
                only_model_right=0,
                only_baseline_right=0,
                detectable_difference=detectable_over_seeds(std, variance, len(seeds), 0.05 / len(methods)),
                per_class={},
            )
        )
    return [replace(c, p_holm=p) for c, p in zip(found, holm([c.p_value for c in found]), strict=True)]


def table(comparisons: list[Comparison]) -> str:
    rows = [
        (
            escape_markdown(c.model),
            len(c.seeds),
            f"{100 * c.difference:+.2f}",
            interval(c.ci95, 2, signed=True),
            f"{c.p_value:.2g}",
            f"{c.p_holm:.2g}",
            c.verdict,
            percent(c.detectable_difference, 2),
        )
        for c in comparisons
    ]
    head = ("method", "seeds", "difference", "95% interval", "p", "p, Holm", "verdict", "detectable")
    return markdown_table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--baseline", metavar="METHOD", help="what the others are compared with; else the file's first")
    parser.add_argument("--images", type=int, metavar="N", help="test images behind each accuracy of a CSV file")
    args = parser.parse_args()
    of_logits = args.file.suffix == ".npz"
    models, labels = read_logits(args.file) if of_logits else ({}, np.array([]))
    accuracies = {} if of_logits else read_accuracies(args.file)
    methods = [*(models or accuracies)]
    if len(methods) < 2:
        raise UserError(f"{args.file}: has {len(methods)} methods; two or more are needed")
    baseline = args.baseline or methods[0]
    if baseline not in methods:
        raise UserError(f"--baseline {baseline}: must be one of {', '.join(methods)}")
    if args.images is not None and (of_logits or args.images < 1):
        raise UserError("--images: must be 1 or more, and is for a CSV file; logits know their images")
    if of_logits:
        pairs = [(method, baseline) for method in methods if method != baseline]
        comparisons, n = compare_all(models, labels, pairs=pairs), len(labels)
        if left_out := {method for method, _ in pairs} - {c.model for c in comparisons}:
            raise UserError(f"{', '.join(sorted(left_out))}: has no seed in common with {baseline}")
    else:
        comparisons, n = compare_accuracies(accuracies, baseline, args.images), args.images or 0
    print(f"Points of accuracy above {baseline}; what can be detected with 80% power.\n\n{table(comparisons)}")
    for comparison in comparisons:
        if len(comparison.seeds) > 1:
            print(verdict(comparison, n))
    if not n:
        print("The sampling of test images is not covered; --images N covers it.")


if __name__ == "__main__":
    with exit_on_error():
        main()
