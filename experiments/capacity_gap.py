"""The nearest published study through the statistics of this repository, as a Markdown table.

    python -m experiments.capacity_gap

docs/data/kd-capacity-gap.csv has the test accuracy of each of the 50 final runs that umutonuryasar/kd-capacity-gap (MIT
licence) published with arXiv 2605.31191: five seeds of each student alone, and with each teacher and method.
"""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

from report.markdown import markdown_table
from report.statistics import holm, paired_t_p, seeds_half_width

FILE = Path(__file__).parent.parent / "docs/data/kd-capacity-gap.csv"


def accuracies(column: str) -> dict[tuple[str, str, str], np.ndarray]:
    """(student, teacher, method) -> the accuracy of each seed (S,)."""
    found = defaultdict(dict)
    with open(FILE) as file:
        for row in csv.DictReader(file):
            found[row["student"], row["teacher"], row["method"]][int(row["seed"])] = float(row[column])
    return {setting: np.array([seeds[s] for s in sorted(seeds)]) for setting, seeds in found.items()}


def table(column: str = "test_accuracy_best_validation") -> str:
    """Each distilled student against the same student alone, paired by seed, Holm-corrected.

    The t-test leaves out the sampling of test images, as no predictions were published.
    """
    found = accuracies(column)
    settings = sorted(setting for setting in found if setting[2] != "none")
    differences = [found[setting] - found[setting[0], "", "none"] for setting in settings]
    p_values, rows = [paired_t_p(d) for d in differences], []
    for setting, d, p, p_holm in zip(settings, differences, p_values, holm(p_values), strict=True):
        mean, half = 100 * d.mean(), 100 * seeds_half_width(d)
        measured = f"{mean:+.2f}", f"{mean - half:+.2f} to {mean + half:+.2f}", f"{p:.2f}", f"{p_holm:.2f}"
        rows.append((*setting, *measured))
    columns = ("gain (points)", "95% interval", "p", "p, Holm")
    return markdown_table(("student", "teacher", "method", *columns), rows)


if __name__ == "__main__":
    print(table(), end="")
