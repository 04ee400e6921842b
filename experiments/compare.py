"""Whether a reproduction of a preset agrees with the published results.

    python -m experiments.compare imgs/reproduction/results.json              # of the preset ablation
    python -m experiments.compare imgs/RUN/results.json finetuning

For each model of the preset that the reproduction has too: the two accuracies (mean ± standard deviation over seeds),
their difference, and whether chance could explain it. Exit status 1 if for any model it could not.
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy import stats

from engine.errors import UserError, exit_on_error, first_line
from experiments.archive import RUNS, load

Accuracies = Mapping[str, np.ndarray]  # model -> the accuracy of each seed (S,)


def published(preset: str) -> tuple[Accuracies, int]:
    """The accuracies of the kept models of a preset, and the number of test images."""
    models, labels = load(preset)
    return {name: model.correct(labels).mean(1) for name, model in models.items()}, len(labels)


def read(path: Path) -> tuple[Accuracies, int]:
    """The same of a results.json. Raises UserError if it cannot be read or is another file."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        of_models = {name: model["accuracy"]["seeds"] for name, model in results["models"].items()}
        accuracies = {name: np.array([*seeds.values()], np.float64) for name, seeds in of_models.items()}
        if not all(len(a) and (a >= 0).all() and (a <= 1).all() for a in accuracies.values()) or results["n_test"] < 1:
            raise ValueError("its accuracies must be numbers from 0 to 1, of one test image or more")
        return accuracies, results["n_test"]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is not a results.json") from None


def p_value(first: np.ndarray, second: np.ndarray, n_test: int) -> float:
    """Two-sided p-value that the accuracies (S,) of two models have the same mean.

    Welch's t-test over seeds. The standard deviation of each side is at least the binomial one of `n_test` images, as
    the test images, or the machine's rounding, may differ; that one is known, with infinite degrees of freedom.
    """
    variances, uncertainty = [], 0.0
    for each in (first, second):
        of_seeds = each.var(ddof=1) if len(each) > 1 else 0.0
        binomial = each.mean() * (1 - each.mean()) / n_test
        variances.append(max(of_seeds, binomial) / len(each))
        if of_seeds > binomial:
            uncertainty += variances[-1] ** 2 / (len(each) - 1)
    if not any(variances):  # both are always right, or always wrong
        return float(first.mean() == second.mean())
    freedom = sum(variances) ** 2 / uncertainty if uncertainty else math.inf
    return float(2 * stats.t.sf(abs(first.mean() - second.mean()) / math.sqrt(sum(variances)), freedom))


def describe(accuracies: np.ndarray) -> str:
    std = accuracies.std(ddof=1) if len(accuracies) > 1 else 0.0
    return f"{100 * accuracies.mean():6.2f} ± {100 * std:.2f} ({len(accuracies)})"


def main() -> None:
    with exit_on_error():
        path, preset = [*sys.argv[1:], "ablation"][:2] if len(sys.argv) in (2, 3) else ("", "")
        if preset not in RUNS:
            raise UserError(f"usage: python -m experiments.compare imgs/RUN/results.json [{'|'.join(RUNS)}]")
        (before, n), (here, n_here) = published(preset), read(Path(path))
        common = [name for name in before if name in here]
        if not common:
            raise UserError(f"{path}: has no model that is published of the preset {preset}")
    print(f"{'model':<20} | published (seeds) | here (seeds) | difference (points) | equal means")
    agree = True
    for name in common:
        first, second = before[name], here[name]
        p = p_value(first, second, min(n, n_here))
        agrees = p >= 0.05 / len(common)  # Bonferroni
        difference = f"{100 * (second.mean() - first.mean()):+.2f}"
        verdict = "" if agrees else ", differs"
        print(f"{name:<20} | {describe(first)} | {describe(second)} | {difference} | p = {p:.2g}{verdict}")
        agree = agree and agrees
    print("No difference is larger than chance explains." if agree else "The reproduction differs.")
    raise SystemExit(0 if agree else 1)


if __name__ == "__main__":
    main()
