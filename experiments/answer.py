"""The tables and the figure of docs/answer.md, from the kept logits.

python -m experiments.answer                    # prints the tables of every preset of the study
python -m experiments.answer docs/effects.png   # and draws the figure
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import exit_on_error
from engine.files import write_durably
from experiments.archive import load
from experiments.presets import STUDY
from report.comparisons import compare_all
from report.effects import effects_figure
from report.figures import png
from report.markdown import align_tables, interval
from report.metrics import Evaluated


def accuracy(model: Evaluated, labels: np.ndarray) -> str:
    """Mean ± standard deviation over seeds, in percent."""
    each = 100 * model.correct(labels).mean(1)
    return f"{each.mean():.2f}" + (f" ± {each.std(ddof=1):.2f}" if len(each) > 1 else "")


def table(run: str) -> str:
    """Every kept model of a run as a Markdown table, with its comparison, if any; Holm-corrected over the run."""
    models, labels = load(run)
    comparisons = {c["model"]: c for c in compare_all(models, labels)}
    head = ("model", "seeds", "accuracy (%)", "against", "difference", "95% interval", "p", "p, Holm", "verdict")
    rows: list[tuple[Any, ...]] = [(*head, "seeds needed"), (":--", *["--:"] * len(head))]
    for name, model in models.items():
        cells = [f"`{name}`", len(model.logits), accuracy(model, labels), *[""] * 7]
        if found := comparisons.get(name):
            p, needed = found["p_value"], found["seeds_needed"]
            cells[3:] = [
                f"`{found['baseline']}`",
                f"{100 * found['difference']:+.2f}",
                interval(found["ci95"], 2, signed=True),
                "none" if p is None else f"{p:.2g}",
                f"{found['p_holm']:.2g}",
                found["verdict"],
                "none" if needed is None else f"{needed:,}",
            ]
        rows.append(tuple(cells))
    return align_tables("".join(f"| {' | '.join(map(str, row))} |\n" for row in rows))


def main() -> None:
    for run in STUDY:
        models, labels = load(run)
        if models:
            print(f"{run} ({len(labels):,} test images)\n\n{table(run)}")
    if sys.argv[1:]:
        write_durably(Path(sys.argv[1]), png(effects_figure(compare_all(*load("ablation")))))


if __name__ == "__main__":
    with exit_on_error():
        main()
