"""Whether a reproduction of the ablation agrees with the published results.

    python -m experiments.compare imgs/reproduction/results.json

For each model of `ablation` that the reproduction has too: the two accuracies (mean ± standard deviation over seeds),
their difference, and whether chance could explain it. Exit status 1 if for any model it could not.
"""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from engine.errors import UserError, exit_on_error
from experiments.archive import load


def published() -> dict[str, Any]:
    """The kept models of `ablation`, as results.json has them."""
    models, labels = load("ablation")
    found = {}
    for name, model in models.items():
        each = model.correct(labels).mean(1)
        std = float(each.std(ddof=1)) if len(each) > 1 else None
        seeds = dict(zip(map(str, model.logits), each.tolist(), strict=True))
        found[name] = {"accuracy": {"mean": float(np.mean(each)), "std": std, "seeds": seeds}}
    return {"n_test": len(labels), "models": found}


def p_value(first: Mapping[str, Any], second: Mapping[str, Any], n_test: int) -> float:
    """Two-sided p-value that two accuracies, entries of results.json, have the same mean.

    Welch's t-test over seeds. The standard deviation of each side is at least the binomial one of `n_test` images, as
    the test images, or the machine's rounding, may differ; that one is known, with infinite degrees of freedom.
    """
    variances, uncertainty = [], 0.0
    for entry in (first, second):
        seeds, of_seeds = len(entry["seeds"]), (entry["std"] or 0.0) ** 2
        binomial = entry["mean"] * (1 - entry["mean"]) / n_test
        variances.append(max(of_seeds, binomial) / seeds)
        if of_seeds > binomial:
            uncertainty += variances[-1] ** 2 / (seeds - 1)
    freedom = sum(variances) ** 2 / uncertainty if uncertainty else math.inf
    return float(2 * stats.t.sf(abs(first["mean"] - second["mean"]) / math.sqrt(sum(variances)), freedom))


def compare(published: Mapping[str, Any], reproduced: Mapping[str, Any]) -> list[tuple[str, float]]:
    """A line for each model of both, and its p-value. Raises UserError if they have no model in common."""
    common = [name for name in published["models"] if name in reproduced["models"]]
    if not common:
        raise UserError("the two results have no model in common")
    found = []
    for name in common:
        first, second = (results["models"][name]["accuracy"] for results in (published, reproduced))
        p = p_value(first, second, min(published["n_test"], reproduced["n_test"]))
        shown = " | ".join(
            f"{100 * entry['mean']:6.2f} ± {100 * (entry['std'] or 0):.2f} ({len(entry['seeds'])})"
            for entry in (first, second)
        )
        found.append((f"{name:<20} | {shown} | {100 * (second['mean'] - first['mean']):+.2f} | p = {p:.2g}", p))
    return found


def main() -> None:
    with exit_on_error():
        if len(sys.argv) != 2:
            raise UserError("usage: python -m experiments.compare imgs/RUN/results.json")
        kept = published()
        try:
            with open(sys.argv[1]) as file:
                lines = compare(kept, json.load(file))
        except (OSError, ValueError) as error:
            raise UserError(f"{sys.argv[1]}: cannot be read ({error})") from None
        except (KeyError, TypeError):
            raise UserError(f"{sys.argv[1]}: is not a results.json") from None
    level = 0.05 / len(lines)  # Bonferroni
    print(f"{'model':<20} | published (seeds) | here (seeds) | difference (points) | equal means")
    for line, p in lines:
        print(line + ", differs" * (p < level))
    agreed = all(p >= level for _, p in lines)
    print("No difference is larger than chance explains." if agreed else "The reproduction differs.")
    raise SystemExit(0 if agreed else 1)


if __name__ == "__main__":
    main()
