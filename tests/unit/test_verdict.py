"""The verdict on anybody's runs."""

import csv
import math
import re

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

from engine.errors import UserError
from experiments import verdict
from report.statistics import paired_p

EXAMPLE = ROOT / "docs/data/kd-capacity-gap-resnet18.csv"


def run(monkeypatch, capsys, *words: object) -> dict[str, dict[str, str]]:
    """The program's table: method -> column -> cell."""
    monkeypatch.setattr("sys.argv", ["verdict", *map(str, words)])
    verdict.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_the_example_holds_the_published_runs_of_resnet18():
    with open(ROOT / "docs/data/kd-capacity-gap.csv") as file:
        published = [row for row in csv.DictReader(file) if row["student"] == "resnet18"]
    of_method = {
        (row["teacher"] + " " + row["method"] if row["teacher"] else "alone", int(row["seed"])): row
        for row in published
    }
    with open(EXAMPLE) as file:
        rows = {(row["method"], int(row["seed"])): row["accuracy"] for row in csv.DictReader(file)}
    assert rows == {key: row["test_accuracy_best_validation"] for key, row in of_method.items()}


def test_accuracies_are_compared_by_the_paired_t_test(monkeypatch, capsys):
    rows = run(monkeypatch, capsys, EXAMPLE)
    accuracies = verdict.read_accuracies(EXAMPLE)
    p_values = {}
    for method in rows:
        pairs = [(accuracies[method][seed], accuracies["alone"][seed]) for seed in range(5)]
        found = stats.ttest_rel(*zip(*pairs, strict=True))
        p_values[method] = found.pvalue
        low, high = found.confidence_interval()
        assert rows[method]["95% interval"] == f"{100 * low:+.2f} to {100 * high:+.2f}"
    for method, p in p_values.items():
        assert rows[method]["p"] == f"{p:.2g}"
    smallest = min(p_values, key=p_values.__getitem__)
    assert rows[smallest]["p, Holm"] == f"{4 * p_values[smallest]:.2g}"
    assert rows["resnet50 logit"]["difference"] == "+0.06"
    assert rows["resnet34 logit"]["difference"] == "-0.08"
    assert {row["verdict"] for row in rows.values()} == {"indistinguishable"}


@pytest.mark.parametrize("scale", [1, 100])
def test_images_widen_the_interval_by_their_binomial_errors(monkeypatch, capsys, tmp_path, scale):
    path, accuracies = tmp_path / "mine.csv", {"old": (0.80, 0.81, 0.79), "new": (0.90, 0.93, 0.90)}
    lines = [f"{m},{seed},{scale * a}" for m, of_seeds in accuracies.items() for seed, a in enumerate(of_seeds)]
    path.write_text("\n".join(["method,seed,accuracy", *lines]))
    d = np.subtract(accuracies["new"], accuracies["old"])
    shares = [(500 * np.mean(of_seeds) + 1) / 502 for of_seeds in accuracies.values()]
    of_images = stats.norm.ppf(0.975) * math.sqrt(sum(p * (1 - p) for p in shares) / 500)
    of_seeds = stats.t.ppf(0.975, 2) * stats.sem(d)
    half = math.hypot(of_images, of_seeds)
    row = run(monkeypatch, capsys, path, "--images", 500, "--baseline", "old")["new"]
    assert row["95% interval"] == f"{100 * (d.mean() - half):+.2f} to {100 * (d.mean() + half):+.2f}"
    assert row["verdict"] == "better"
    assert run(monkeypatch, capsys, path, "--baseline", "new")["old"]["difference"] == "-11.00"


def test_logits_are_compared_image_by_image(monkeypatch, capsys, tmp_path):
    random, labels = np.random.default_rng(0), np.arange(300) % 3
    logits = {
        f"{method}/seed{seed}": np.eye(3)[labels] + random.normal(size=(300, 3)) / sharpness
        for method, sharpness in (("alone", 1), ("taught", 2))
        for seed in range(4)
    }
    np.savez(tmp_path / "runs.npz", labels=labels, **logits, **{"validation/alone/seed0": labels})
    right = {
        method: np.stack([logits[f"{method}/seed{s}"].argmax(1) == labels for s in range(4)])
        for method in ("alone", "taught")
    }
    row = run(monkeypatch, capsys, tmp_path / "runs.npz")["taught"]
    assert row["difference"] == f"{100 * (right['taught'].mean() - right['alone'].mean()):+.2f}"
    assert row["p"] == f"{paired_p(right['taught'], right['alone']):.2g}"
    assert row["verdict"] == "better"


def test_differences_that_are_the_same_in_all_seeds_are_not_certain(monkeypatch, capsys, tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(HEAD + "a|b,0,70.6\na|b,1,70.9\nbase,0,70.1\nbase,1,70.4\nsure,0,100\nsure,1,100\n")
    rows = run(monkeypatch, capsys, path, "--baseline", "base", "--images", 1000)
    (row,) = (row for method, row in rows.items() if method.startswith("a"))
    assert row["verdict"] == "indistinguishable"
    path.write_text(HEAD + "alone,0,90\nalone,1,90\nsure,0,100\nsure,1,100\n")
    row = run(monkeypatch, capsys, path, "--images", 10)["sure"]
    assert float(row["95% interval"].split()[0]) < -10  # of ten images one was wrong
    path.write_text(HEAD + "alone,0,70.1\nalone,1,70.4\nkd,0,70.6\nkd,1,70.9\n")
    with pytest.raises(UserError, match="kd differs from alone by the same in all seeds"):
        run(monkeypatch, capsys, path)


HEAD = "method,seed,accuracy\n"
TWO = HEAD + "a,0,0.9\na,1,0.9\nb,0,0.8\nb,1,0.7\n"


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (None, [], "cannot be read"),
        ("method,accuracy\na,0.9\n", [], "no column seed"),
        (HEAD + "a,0,abc\n", [], "line 2: seed must be an integer"),
        (HEAD + "a,0,101\n", [], "accuracy = 101"),
        (HEAD + "a,0,nan\n", [], "accuracy = nan"),
        (HEAD + "a,0,0.9\na,0,0.8\n", [], "a has seed 0 twice"),
        (HEAD + "a,0,0.9\n", [], "has 1 methods"),
        (HEAD + "a,0,0.9\nb,1,0.8\n", [], "0 seeds in common"),
        (HEAD + "a,0,70.1\na,1,71.3\nb,0,0.75\nb,1,0.76\n", [], "b has accuracies up to 1"),
        (TWO, ["--baseline", "c"], "must be one of a, b"),
        (TWO, ["--images", "0"], "--images: must be 1 or more"),
    ],
)
def test_what_cannot_be_compared_is_named(monkeypatch, capsys, tmp_path, text, flags, message):
    path = tmp_path / "runs.csv"
    if text:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        run(monkeypatch, capsys, path, *flags)


def test_logits_of_the_wrong_shape_are_named(monkeypatch, capsys, tmp_path):
    np.savez(tmp_path / "a.npz", **{"labels": np.arange(3), "m/seed0": np.zeros((2, 3))})
    np.savez(tmp_path / "b.npz", **{"m/seed0": np.zeros((2, 3))})
    (tmp_path / "c.npz").write_text("no archive")
    (tmp_path / "d.npz").touch()
    np.savez(tmp_path / "e.npz", **{"labels": np.arange(3), "m/seed0": np.full((3, 3), np.nan)})
    np.savez(tmp_path / "f.npz", **{"labels": np.arange(3) - 1, "m/seed0": np.zeros((3, 3))})
    np.savez(tmp_path / "g.npz", **{"labels": np.zeros((3, 1)), "m/seed0": np.zeros((3, 3))})
    wrong = {"a": "m/seed0 must be logits", "b": "no array labels", "c": "cannot be read", "d": "cannot be read"}
    wrong |= {"e": "m/seed0 has logits that are not finite", "f": "labels must be", "g": "labels must be"}
    for name, message in wrong.items():
        with pytest.raises(UserError, match=message):
            run(monkeypatch, capsys, tmp_path / f"{name}.npz")
