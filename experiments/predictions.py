"""Which of the predictions in docs/predictions.md have come true, by the kept predictions.

python -m experiments.predictions    # prints the table of docs/answer.md, and how many have failed
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import exit_on_error
from experiments.answer import compared, comparison_cells
from experiments.archive import load
from experiments.presets import STUDY
from report.markdown import markdown_table

PAGE = Path(__file__).parent.parent / "docs/predictions.md"


class Prediction(NamedTuple):
    number: int
    run: str
    rows: dict[str, str]  # each row of the run, and the row that it is compared with
    against: str
    text: str


class Outcome(NamedTuple):
    """The comparison of one row, and whether the prediction holds for it."""

    prediction: Prediction
    comparison: dict[str, Any]
    held: bool


def predicted() -> Iterator[Prediction]:
    """The predictions of the page, one for each line of its table."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and cells[0].isdigit():
            number, run, rows, against, text, _ = cells
            names = re.findall(r"`(\w+)`", rows)
            if " to " in rows:
                known = list(STUDY[run].recipes)
                names = known[known.index(names[0]) : known.index(names[1]) + 1]
            baseline = re.findall(r"`([\w*]+)`", against)[0]  # student_*: kd_2 is compared with student_2
            pairs = {name: baseline.replace("*", name.split("_")[-1]) for name in names}
            yield Prediction(int(number), run, pairs, against, text)


@cache
def comparisons(run: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The comparisons of a run's kept models, by model and baseline."""
    return {(c["model"], c["baseline"]): c for c in compared(run, *load(run))}


def gain(run: str, model: str, baseline: str = "student") -> float:
    """The difference in percentage points."""
    return 100 * comparisons(run)[model, baseline]["difference"]


def loses(run: str, model: str, baseline: str = "kd") -> bool:
    return comparisons(run)[model, baseline]["verdict"] == "worse"


def gains(run: str, model: str, baseline: str = "student") -> bool:
    return comparisons(run)[model, baseline]["verdict"] == "better"


def undecided(run: str, model: str, baseline: str = "kd", within: float = 100) -> bool:
    """Whether the comparison has no verdict, and the difference is at most `within` points."""
    verdict = comparisons(run)[model, baseline]["verdict"]
    return abs(gain(run, model, baseline)) <= within and verdict == "indistinguishable"


def falls_with_labels(run: str, row: str) -> bool:
    """The gain over the student of as many labels; `kd` has 10% of them."""
    found = gain(run, row, row.replace("kd", "student"))
    if row == "kd_100":
        return not gains(run, row, "student_100")
    return found > gain(run, "kd") if row == "kd_2" else found < gain(run, "kd")


def rises_with_the_teacher(run: str, row: str) -> bool:
    """Whether no row with a worse teacher gains more, and the row loses if its teacher is worse than the student."""
    models, labels = load(run)
    accuracy = {name: model.correct(labels).mean() for name, model in models.items()}
    taught_by = {name: accuracy[STUDY[run].recipes[name].teacher] for name, _ in comparisons(run)}
    harmless = taught_by[row] >= accuracy["student"] or loses(run, row, "student")
    return harmless and all(gain(run, row) >= gain(run, name) for name in taught_by if taught_by[name] < taught_by[row])


# Whether each prediction holds for a row of its run, with all that it says.
HOLDS: dict[int, Callable[[str, str], bool]] = {
    1: lambda run, row: gains(run, row) and gain(run, row) >= 2,
    2: lambda run, row: loses(run, row) and gain(run, row, "kd") <= -gain(run, "kd") / 2,
    3: lambda run, row: gain(run, row, "kd") < gain(run, "kd_without_t2", "kd") / 2,
    4: lambda run, row: undecided(run, row, "student", within=1),
    5: lambda run, row: 0.5 <= gain(run, row) <= 2 and gain(run, row) >= gain(run, "original"),
    6: lambda run, row: undecided(run, row, "student_2x", within=1),
    7: lambda run, row: loses(run, row),
    8: lambda run, row: undecided(run, row, within=0.5),
    9: lambda run, row: undecided(run, row, within=1),
    10: lambda run, row: loses(run, row) if row == "kd_alpha_90" else undecided(run, row),
    11: lambda run, row: loses(run, row) and gain(run, row) < 1,
    12: lambda run, row: loses(run, row) and gain(run, row) <= 0,
    13: lambda run, row: loses(run, row) and gain(run, row) < gain(run, "kd") / 2,
    14: lambda run, row: loses(run, row) and gain(run, row) < 1,
    15: falls_with_labels,
    16: rises_with_the_teacher,
    17: lambda run, row: gain(run, row) > gain("methods", "kd"),  # where kd of ablation has the same seeds
    18: lambda run, row: not gains(run, row, "kd"),
    19: lambda run, row: undecided(run, row, "student", within=1),
    20: lambda run, row: gains(run, row, "student_2x") and gain(run, row, "student_2x") >= 4,
}


def outcomes() -> list[Outcome]:
    """Those of the predictions whose rows are kept with at least three seeds."""
    found = []
    for prediction in predicted():
        for row, baseline in prediction.rows.items():
            comparison = comparisons(prediction.run).get((row, baseline))
            if comparison and len(comparison["seeds"]) >= 3:
                found.append(Outcome(prediction, comparison, HOLDS[prediction.number](prediction.run, row)))
    return found


def counts() -> dict[str, int]:
    """The number of predictions that have been tested, and of those that have failed for one of their rows or more."""
    found = outcomes()
    tested = {outcome.prediction.number for outcome in found}
    failed = {outcome.prediction.number for outcome in found if not outcome.held}
    return {"tested": len(tested), "failed": len(failed)}


def table() -> str:
    """The table of docs/answer.md: what was predicted for each row, and what came out."""
    rows = []
    for prediction, comparison, held in outcomes():
        cells = comparison_cells(comparison)
        own = (prediction.number, f"`{comparison['model']}`", prediction.against, prediction.text)
        measured = (cells["difference"], len(comparison["seeds"]), cells["verdict"])
        rows.append((*own, *measured, "yes" if held else "**no**"))
    return markdown_table(("#", "row", "against", "predicted", "difference", "seeds", "verdict", "held"), rows)


if __name__ == "__main__":
    with exit_on_error():
        print(table())
        print(counts())
