"""Synthetic models whose true accuracies and differences are known."""

import json

import numpy as np
from conftest import ROOT
from scipy.stats import norm

from config import PRESETS
from report.comparisons import Comparison, Disagreements
from report.metrics import Evaluated


def without(found, name: str):
    """What a JSON file holds, without the rows of a model."""
    if isinstance(found, dict):
        return {key: without(value, name) for key, value in found.items() if key != name}
    if isinstance(found, list):
        return [without(v, name) for v in found if not (isinstance(v, dict) and v.get("model") == name)]
    return found


def example_results(rows: tuple[str, ...] = ("teacher", "student", "student_kd")) -> dict:
    """docs/example/results.json, or some of its rows, with its comparisons as the report has them."""
    results = json.loads((ROOT / "docs/example/results.json").read_text(encoding="utf-8"))
    for name in [name for name in results["models"] if name not in rows]:
        results = without(results, name)
    for entry in results["comparisons"]:
        del entry["verdict"]  # follows from the others
        entry["disagreements"] = Disagreements(**entry["disagreements"])
    results["comparisons"] = [Comparison(**{"environments_differ": [], **entry}) for entry in results["comparisons"]]
    return results


def simulated_seeds(random, seeds: int, n: int, difference: float, seed_std: float, shared: float) -> dict:
    """Two models over several seeds: a true difference, how much seeds differ, and images that are harder for one.

    They are right and wrong together on half of the images of a seed, and independently on the others.
    """
    easier = random.normal(0, shared, n)  # in points of probability, the same in every seed
    recipes, logits = PRESETS["scratch"].recipes, {"student": {}, "student_kd": {}}
    for seed in range(seeds):
        gain = difference + random.normal(0, seed_std) + easier
        luck, own = random.random((2, n))
        own = np.where(random.random(n) < 0.5, luck, own)
        right = {"student": luck < 0.5, "student_kd": own < 0.5 + gain}
        for name, r in right.items():
            logits[name][seed] = np.stack([r, ~r], 1).astype(np.float32)
    return {name: Evaluated(recipes[name], by_seed, {}) for name, by_seed in logits.items()}


def simulated(random, n: int, discordant: float, difference: float) -> Evaluated:
    """Two models of n images that just one of them gets right on a share `discordant`."""
    kinds = random.choice(
        [1, -1, 0], n, p=[(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant]
    )
    recipes = PRESETS["scratch"].recipes
    right = {"student": kinds != 1, "student_kd": kinds != -1}  # logits of two classes, the label always 0
    return {
        name: Evaluated(recipes[name], {0: np.stack([right[name], ~right[name]], 1).astype(np.float32)}, {})
        for name in right
    }


def family(random, rows: int, seeds: int, n: int, better: float = 0.0) -> dict[str, Evaluated]:
    """`rows` students and their baseline, all right on 65% of the images; the first is right on `better` more.

    Between two seeds of a recipe 16% of the images change from right to wrong or back, between two recipes 20%: about
    as in the study of docs/answer.md. A latent variable, the sum of normal ones, decides; seeds add 0.4 points.
    """
    recipe, models = PRESETS["scratch"].recipes["student"], {}
    image = np.sqrt(0.778) * random.standard_normal(n)
    for row in range(rows + 1):
        latent = image + np.sqrt(0.078) * random.standard_normal(n) + 0.012 * random.standard_normal((seeds, 1))
        latent = latent + np.sqrt(0.144) * random.standard_normal((seeds, n))
        right = latent > norm.ppf(0.35 - better * (row == 1))
        logits = np.stack([right, ~right], 2).astype(np.float32)  # of two classes, the label always 0
        models[f"student_{row}"] = Evaluated(recipe, dict(enumerate(logits)), {})
    return models


def probabilities_of(logits) -> np.ndarray:
    e = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits, axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def some_logits(n: int = 300, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    return (2 * random.normal(size=(n, classes)) + 2 * np.eye(classes)[labels]).astype(np.float32), labels


def three_models(n: int = 200) -> tuple[dict[str, Evaluated], np.ndarray]:
    """Teacher with seeds 0 and 1, student with 1 and 2, student_kd with 0, 1 and 2."""
    seeds = {"teacher": (0, 1), "student": (1, 2), "student_kd": (0, 1, 2)}
    labels = some_logits(n)[1]
    models = {
        name: Evaluated(
            PRESETS["scratch"].recipes[name],
            {seed: some_logits(n, seed=10 * number + seed)[0] + 2 * np.eye(4)[labels] for seed in of_model},
            {},
        )
        for number, (name, of_model) in enumerate(seeds.items(), 1)
    }
    return models, labels
