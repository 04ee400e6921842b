"""The study's logits, kept in docs/data/RUN/seedS/MODEL.npz: its accuracies and tests are computed from them.

    python evaluate.py --run controls && python -m experiments.archive controls

keeps those of the run's finished models that are not kept yet, except for those that it shares with `ablation`.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError, exit_on_error
from engine.files import write_durably
from experiments.presets import STUDY
from report.metrics import Evaluated

FOLDER = Path(__file__).parent.parent / "docs/data"


def owner(run: str, name: str) -> str:
    """The run in whose folder a model is kept: its own, or `ablation` if that has the same model."""
    config, ablation = STUDY[run], STUDY["ablation"]
    same = name in ablation.recipes and config.recipes.get(name) == ablation.recipes[name]
    return "ablation" if same and config.augment == ablation.augment else run


def keep(run: str, predictions: Path) -> list[Path]:
    """Copy the test logits of predictions.npz; returns the files written. Raises UserError if it cannot be read."""
    try:
        with np.load(predictions) as arrays:
            kept = {key: arrays[key] for key in arrays if not key.startswith("validation/")}
    except (OSError, ValueError) as error:
        raise UserError(f"{predictions}: cannot be read ({error}); python evaluate.py --run {run} writes it") from None
    labels, written = kept.pop("labels").astype(np.uint8), []
    for key, logits in kept.items():
        name, seed = key.rsplit("/", 1)
        path, buffer = FOLDER / run / seed / f"{name}.npz", io.BytesIO()
        if owner(run, name) == run and not path.exists():
            np.savez_compressed(buffer, logits=logits, labels=labels)
            write_durably(path, buffer.getvalue())
            written.append(path)
    return written


def load(run: str) -> tuple[dict[str, Evaluated], np.ndarray]:
    """The kept models of a run, without their histories, and the labels (n,) of the test images."""
    models, labels = {}, np.array([], dtype=int)
    for name, recipe in STUDY[run].recipes.items():
        logits = {}
        for seed in STUDY[run].seeds_of(name):
            path = FOLDER / owner(run, name) / f"seed{seed}" / f"{name}.npz"
            if path.exists():
                with np.load(path) as arrays:
                    logits[seed], labels = arrays["logits"], arrays["labels"].astype(int)
        if logits:
            models[name] = Evaluated(recipe, logits, {seed: [] for seed in logits})
    return models, labels


def evaluation_faults() -> dict[str, Any]:
    """What `benchmarks.evaluation_faults` has measured and written."""
    return json.loads((FOLDER / "evaluation_faults.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    with exit_on_error():
        if len(sys.argv) != 2 or sys.argv[1] not in STUDY:
            raise UserError(f"usage: python -m experiments.archive RUN, one of {', '.join(STUDY)}")
        for path in keep(sys.argv[1], Path("imgs", sys.argv[1], "predictions.npz")):
            print(path)
