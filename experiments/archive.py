"""The predictions of the study's models: its accuracies and tests are computed from them.

    python evaluate.py --run controls && python -m experiments.archive controls

keeps those of the run's finished models that are not kept yet, except for those that it shares with `ablation`.

docs/data/RUN/seedS.npz holds the labels (n,) of the test images and, for each model, an array (2, n): the first and the
last of the classes with the highest logit, which differ where logits tie. The first counts as predicted.
seedS.json beside it holds the environment of each training and its history, a record for each epoch. The models that
were kept first have none.
docs/data/ablation/replaced has the 24 models of seeds 0 to 2 that were trained again (docs/answer.md says why).

Logits are not kept, so probabilities and what follows from them cannot be recomputed. Up to commit a6fd958 the git
history has the logits (n, 10), in docs/data/RUN/seedS/MODEL.npz.
"""

import io
import json
import sys
from pathlib import Path

import numpy as np

from engine.errors import UserError, exit_on_error, first_line
from engine.files import write_durably
from experiments.presets import FURTHER, STUDY
from report.metrics import Evaluated

FOLDER = Path(__file__).parent.parent / "docs/data"
RUNS = STUDY | FURTHER


def owner(run: str, name: str) -> str:
    """The run in whose folder a model is kept: its own, or `ablation` if that has the same model."""
    config, ablation = RUNS[run], RUNS["ablation"]
    same = name in ablation.recipes and config.recipes.get(name) == ablation.recipes[name]
    return "ablation" if same and config.augment == ablation.augment else run


def highest(logits: np.ndarray) -> np.ndarray:
    """The first and the last of the classes with the highest logit: (n, C) -> (2, n) uint8."""
    last = logits.shape[1] - 1 - logits[:, ::-1].argmax(1)
    return np.stack([logits.argmax(1), last]).astype(np.uint8)


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a kept file; none if there is no such file."""
    if not path.exists():
        return {}
    with np.load(path) as arrays:
        return dict(arrays)


def keep(run: str, report: Path) -> list[Path]:
    """Add the models of a report, the folder imgs/RUN, that are not kept yet; returns the files of predictions written.

    Raises UserError if the report cannot be read, or if its test images are not those of the models that are kept.
    """
    try:
        with np.load(report / "predictions.npz") as arrays:
            found = {key: arrays[key] for key in arrays if not key.startswith("validation/")}
        results = json.loads((report / "results.json").read_text(encoding="utf-8"))["models"]
    except Exception as error:  # of many types, for a damaged file
        raise UserError(
            f"{report}: cannot be read ({first_line(error)}); python evaluate.py --run {run} writes it"
        ) from None
    labels = found.pop("labels").astype(np.uint8)
    by_file: dict[Path, dict[str, np.ndarray]] = {}
    written = []
    for key, logits in found.items():
        name, seed = key.rsplit("/", 1)
        if owner(run, name) == run:
            by_file.setdefault(FOLDER / run / f"{seed}.npz", {})[name] = highest(logits)
    for path, models in by_file.items():
        kept, buffer = read(path), io.BytesIO()
        if kept and not np.array_equal(kept["labels"], labels):
            raise UserError(f"{report}: has other test images than {path}; evaluate the run on those")
        if added := [name for name in models if name not in kept]:
            seed, training = path.stem.removeprefix("seed"), path.with_suffix(".json")
            records = json.loads(training.read_text(encoding="utf-8")) if training.exists() else {}
            for name in added:
                of_model = results[name]
                records[name] = {"environment": of_model["environments"][seed], "history": of_model["history"][seed]}
            write_durably(training, (json.dumps(records, indent=1) + "\n").encode())
            np.savez_compressed(buffer, **{"labels": labels, **models, **kept})
            write_durably(path, buffer.getvalue())
            written.append(path)
    return written


def load(run: str, part: str = "") -> tuple[dict[str, Evaluated], np.ndarray]:
    """The kept models of a run, without their histories, and the labels (n,) of the test images.

    A `logit` is 1 for the first and the last of the classes that had the highest one, and 0 for the others: enough for
    predictions and ties, and for nothing else. `part="replaced"` loads the models of `ablation` that were replaced.
    """
    models, labels = {}, np.array([], dtype=int)
    for name, recipe in RUNS[run].recipes.items():
        logits = {}
        for seed in RUNS[run].seeds_of(name):
            arrays = read(FOLDER / owner(run, name) / part / f"seed{seed}.npz")
            if name in arrays:
                labels = arrays["labels"].astype(int)
                logits[seed] = np.eye(labels.max() + 1, dtype=np.float32)[arrays[name]].max(0)  # (2, n) -> (n, C)
        if logits:
            models[name] = Evaluated(recipe, logits, {seed: [] for seed in logits})
    return models, labels


Correct = dict[
    str, dict[int, np.ndarray]
]  # model -> seed -> (n,): the share of its runs that classify each image right


def load_correct(run: str, replaced: bool = True) -> tuple[Correct, np.ndarray]:
    """Which test images each kept model of a run classifies correctly, and their labels (n,).

    Some models of `ablation` were trained twice: an image that only one of the two runs gets right counts 0.5.
    `replaced=False` leaves out the runs that were replaced.
    """
    models, labels = load(run)
    correct: Correct = {}
    for name, model in models.items():
        correct[name] = dict(zip(model.logits, model.correct(labels).astype(float), strict=True))
    again = load("ablation", "replaced")[0] if replaced else {}
    for name in again.keys() & correct.keys():
        if owner(run, name) == "ablation":
            for seed in again[name].logits.keys() & correct[name].keys():
                (before,) = again[name].correct(labels, [seed])
                correct[name][seed] = (correct[name][seed] + before) / 2
    return correct, labels


if __name__ == "__main__":
    with exit_on_error():
        if len(sys.argv) != 2 or sys.argv[1] not in RUNS:
            raise UserError(f"usage: python -m experiments.archive RUN, one of {', '.join(RUNS)}")
        for path in keep(sys.argv[1], Path("imgs", sys.argv[1])):
            print(path)
