"""Two hundred random mutations of each thing that the program reads: each ends in ten seconds, well or with one error.

In this process, with what is named last in a failure to repeat it: the number of the mutation, which seeds it.
"""

import contextlib
import copy
import io
import json
import random
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, flags, override
from PIL import Image

import custom_resnet
import evaluate
import teacher_student_model
import utils
from config import PRESETS
from engine import datasets, named, reach, soft_losses
from engine.checkpoints import load_checkpoint, load_logits, save_checkpoint
from engine.datasets import load_dataset
from engine.errors import UserError
from engine.models import build_model, check_image_size, initial_model
from engine.recipes import Recipe
from experiments import archive, compare

pytestmark = pytest.mark.chaos
NUMBER = 200
ODD = (
    *("", " ", "0", "-1", "1e999", "nan", "inf", "none", "true", "0.5", "1" * 30, "é", "a\0b", "a\nb", "--", "x" * 300),
    *(
        "../..",
        "/",
        "~",
        "*",
        "$HOME",
        "'",
        '"',
        "{}",
        "[]",
        "()",
        "student",
        "teacher",
        "digits",
        "os:system",
        "=",
        ",",
    ),
)


class TooSlow(BaseException):
    pass


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_):
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(kind: str, attempt: Callable[[random.Random], None]) -> None:
    """Call `attempt` with the random numbers of each mutation, and report all that did not end well."""
    ended: dict[str, int] = {}
    failures = []
    for number in range(NUMBER):
        output = io.StringIO()
        try:
            with contextlib.redirect_stderr(output), contextlib.redirect_stdout(io.StringIO()), time_limit(10):
                attempt(random.Random(f"{kind} {number}"))
            how = "well"
        except UserError as error:
            how = "error" if error.messages and all(error.messages) else "no message"
        except SystemExit as error:
            errors = output.getvalue().count("error: ")
            how = (
                "well"
                if error.code in (0, None)
                else "error"
                if error.code in (1, 2) and errors == 1
                else "unexplained"
            )
        except (Exception, TooSlow) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            how = f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}, line {where.lineno})"
        if "Traceback" in output.getvalue() or "Warning: " in output.getvalue().replace("\nWarning: ", ""):
            how = f"printed {output.getvalue()[-300:]}"
        if how not in ("well", "error"):
            failures.append(f"{kind} {number}: {how}")
        ended[how] = ended.get(how, 0) + 1
    print(f"\n{kind}: {ended.get('well', 0)} of {NUMBER} mutations ended well, {ended.get('error', 0)} with an error")
    assert not failures, "\n".join(failures)


def mutate_bytes(content: bytes, chance: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 3, 30))):
        place = chance.randrange(len(found))
        match chance.randrange(4):
            case 0:
                found[place] ^= 1 << chance.randrange(8)
            case 1:
                del found[place : place + chance.choice((1, 10, 1000))]
            case 2:
                found[place:place] = chance.randbytes(chance.choice((1, 10, 1000)))
            case 3:
                found = found[: place + 1]
        found = found or bytearray(b"\0")
    return bytes(found)


def mutate_text(text: str, chance: random.Random) -> str:
    """The text of a program with one to three of its words or lines changed."""
    for _ in range(chance.choice((1, 1, 3))):
        words = re.findall(r"\w+|\s+|[^\w\s]", text)
        place = chance.randrange(len(words))
        match chance.randrange(5):
            case 0:
                del words[place]
            case 1:
                words[place] = chance.choice(words)
            case 2:
                words[place] = chance.choice((*ODD, "None", "[1]", "{}", "lambda: 0", "1/0", "undefined", "()"))
            case 3:
                words[place:place] = [words[place]]
            case 4:
                lines = text.splitlines(keepends=True)
                del lines[chance.randrange(len(lines))]
                words = lines or ["\n"]
        text = "".join(words)
    return text


def mutate_value(value, chance: random.Random):
    """A nested value with one of its parts, at any depth, replaced, removed or renamed."""
    value = copy.copy(value)
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice([*value])
        match chance.randrange(6):
            case 0:
                del value[key]
            case 1:
                value[chance.choice((*ODD, 0, None))] = value.pop(key)
            case _:
                value[key] = mutate_value(value[key], chance)
        return value
    if isinstance(value, list) and value and chance.random() < 0.8:
        place = chance.randrange(len(value))
        value[place] = mutate_value(value[place], chance)
        return value
    wrong = (None, -1, 0, 1.5, 10**30, float("nan"), True, [], {}, [1], {"a": 1}, torch.zeros(2), torch.tensor(1), *ODD)
    if isinstance(value, torch.Tensor) and chance.random() < 0.7:
        return chance.choice((value[:1] if value.ndim else value, value.double(), value.flatten(), value * torch.nan))
    return chance.choice(wrong)


def mutate_state(state: dict, chance: random.Random) -> dict:
    """What a checkpoint holds, mutated; it stays a dict."""
    found = mutate_value(state, chance)
    return found if isinstance(found, dict) else mutate_state(state, chance)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


# What users write


@pytest.fixture
def no_training(monkeypatch):
    """A run ends where training would start."""

    def begin(*_):
        raise SystemExit(0)

    monkeypatch.setattr(custom_resnet, "fit", begin)


def test_command_lines(trained, tmp_path, no_training):
    """Nothing that is there already is changed, except by --overwrite, which is left out."""
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    before, fields = contents(tmp_path), [*map(str, flags(tmp_path))]
    names = [word.partition("=")[0] for word in fields if word.startswith("--")]
    names += ["--run", "--only", "--sweep", "--jobs", "--augment", "--student.weights", "--student_kd.soft_loss"]
    names += [
        "--student_kd.loss_options",
        "--predict",
        "--export",
        "--help",
        "--preset",
        "--nothing",
        "-x",
        "--validation_size",
    ]

    def attempt(chance: random.Random) -> None:
        words = list(fields)
        for _ in range(chance.choice((1, 1, 2, 3))):
            flag, value = chance.choice(names), chance.choice(ODD)
            if flag in ("--checkpoints_path", "--imgs_path"):
                value = str(tmp_path / "other" / re.sub(r"[\0/.~]", "_", value))
            match chance.randrange(4):
                case 0:
                    words = override(words, f"{flag}={value}")
                case 1:
                    words = override(words, flag, value)
                case 2:
                    words.insert(chance.randrange(len(words)), value)
                case 3:
                    del words[chance.randrange(len(words))]
        kept = any(word.startswith("--checkpoints_path") for word in words)
        words += [] if kept else [f"--checkpoints_path={tmp_path / 'other'}"]
        main = chance.choice((custom_resnet, teacher_student_model, evaluate)).main
        main(words)

    check("command line", attempt)
    after = contents(tmp_path)
    assert all(after[path] == content for path, content in before.items())


def test_config_py(tmp_path, monkeypatch, no_training):
    text = (ROOT / "config.py").read_text(encoding="utf-8")
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def attempt(chance: random.Random) -> None:
        (tmp_path / "config.py").write_text(mutate_text(text, chance), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(sys.modules, "config", raising=False)
            custom_resnet.main(["--dataset=nowhere", "--device=cpu"])

    original = sys.modules["config"]
    try:
        check("config.py", attempt)
    finally:
        sys.modules["config"] = original


MINE = """
import torch
from torch import nn

WIDTH = 8


class Net(nn.Module):
    def __init__(self, num_classes, width=WIDTH):
        super().__init__()
        self.first = nn.Linear(3 * 64, width)
        self.last = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.last(self.first(x.flatten(1)).relu())


def loss(z, v, labels, temperature, power=2.0):
    return (z - v).abs().pow(power).mean()


def load():
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8) for _ in range(40)]
    items = [(image, number % 2) for number, image in enumerate(images)]
    return items, items
"""


def test_a_file_of_the_users(tmp_path, monkeypatch):
    reach.code_digest()
    monkeypatch.setattr(reach, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def attempt(chance: random.Random) -> None:
        (tmp_path / "mine.py").write_text(mutate_text(MINE, chance), encoding="utf-8")
        sys.modules.pop("mine", None)
        named.load.cache_clear()
        reach.read_source.cache_clear()
        recipe = Recipe(arch="mine:Net", teacher="t", soft_loss="mine:loss")
        named.code_of("mine:Net")
        check_image_size(build_model("mine:Net", 10), "mine:Net", 8, 10)
        soft_losses.check(recipe.soft_loss, recipe.soft_loss_options, 10)
        load_dataset(
            replace(
                PRESETS["demo"],
                dataset="mine:load",
                device="cpu",
                batch_size=4,
                validation_size=0,
                recipes={"student": Recipe(arch="mine:Net")},
            )
        )

    try:
        check("my_project.py", attempt)
    finally:
        sys.modules.pop("mine", None)
        named.load.cache_clear()
        reach.read_source.cache_clear()


# What the program has written


@pytest.mark.parametrize("mutate", ["bytes", "values"])
def test_checkpoints(trained, tmp_path, image_folder, mutate):
    """Values are changed with a valid digest, as by hand. The other checkpoints stay as they are."""
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    image = image_folder({"a": 1}) / "a/0.png"
    paths = sorted((tmp_path / "checkpoints").rglob("*.pt"))
    before = contents(tmp_path)
    states = {path: load_checkpoint(path) for path in paths}

    def attempt(chance: random.Random) -> None:
        path = chance.choice(paths)
        if mutate == "bytes":
            path.write_bytes(mutate_bytes(before[path], chance))
        else:
            save_checkpoint(path, {**mutate_state(states[path], chance), "format": states[path]["format"]})
        mutated = path.read_bytes()
        words = ["--run=demo", f"--checkpoints_path={tmp_path / 'checkpoints'}", "--device=cpu"]
        try:
            if chance.random() < 0.5:
                evaluate.main([*words, "--predict", str(image)])
            else:
                teacher_student_model.main(flags(tmp_path, "--seeds", "0", "1"))
        finally:
            kept = contents(tmp_path) == {**before, path: mutated}
            path.write_bytes(before[path])
        assert kept

    check(f"checkpoint, {mutate}", attempt)


def test_stored_logits(tmp_path):
    shape, path = (2, 4, 3), tmp_path / "teacher.logits"
    state = {"fingerprint": {"teacher": "0" * 64, "image_size": 8}, "logits": torch.randn(shape)}
    save_checkpoint(path, state)
    content = path.read_bytes()

    def attempt(chance: random.Random) -> None:
        if chance.random() < 0.5:
            path.write_bytes(mutate_bytes(content, chance))
        else:
            save_checkpoint(path, mutate_state(state, chance))
        assert load_logits(path, state["fingerprint"], shape).shape == shape

    check("stored logits", attempt)


def test_a_report_that_is_compared(tmp_path):
    models = {name: {"accuracy": {"seeds": {"0": 0.6, "1": 0.61}}} for name in ("student", "kd")}
    results, path = {"n_test": 100, "models": models}, tmp_path / "results.json"

    def attempt(chance: random.Random) -> None:
        if chance.random() < 0.5:
            path.write_bytes(mutate_bytes(json.dumps(results).encode(), chance))
        else:
            path.write_text(json.dumps(mutate_value(results, chance), default=str))
        accuracies, n = compare.read(path)
        for each in accuracies.values():
            compare.p_value(each, np.array([0.5, 0.6]), n)

    check("results.json", attempt)


# What comes from elsewhere


def test_images(tmp_path, image_folder):
    folder = image_folder({f"{split}/{name}": 3 for split in ("train", "test") for name in ("a", "b")}, size=(9, 7))
    formats = {
        ".png": "PNG",
        ".jpg": "JPEG",
        ".gif": "GIF",
        ".webp": "WEBP",
        ".tiff": "TIFF",
        ".bmp": "BMP",
        ".ppm": "PPM",
    }
    originals = {}
    for suffix, kind in formats.items():
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        more = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
        Image.open(folder / "train/a/0.png").save(buffer, kind, **more)
        originals[suffix] = buffer.getvalue()
    config = replace(PRESETS["demo"], dataset=str(folder), device="cpu", batch_size=2, image_size=8, validation_size=0)
    config = replace(config, recipes={"student": Recipe(arch="timm:test_resnet", pretrained=False)})

    def attempt(chance: random.Random) -> None:
        suffix = chance.choice([*formats])
        path = folder / f"train/b/mutated{suffix}"
        path.write_bytes(mutate_bytes(originals[suffix], chance))
        try:
            datasets.load_dataset(config)
        finally:
            path.unlink()

    check("image", attempt)


def test_weights(tmp_path):
    recipe = Recipe(arch="timm:test_resnet", pretrained=False, weights=str(tmp_path / "weights.pth"))
    classes, path = [*"abc"], tmp_path / "weights.pth"
    state = build_model(recipe.arch, 3).state_dict()
    torch.save(state, path)
    content = path.read_bytes()

    def attempt(chance: random.Random) -> None:
        if chance.random() < 0.5:
            path.write_bytes(mutate_bytes(content, chance))
        else:
            nested = {"state_dict": dict(state), "epoch": 3, "args": {"lr": 0.1}}
            torch.save(mutate_value(chance.choice((dict(state), nested)), chance), path)
        initial_model(recipe, classes)

    check("weights", attempt)


def test_what_is_kept_of_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "FOLDER", tmp_path / "kept")
    arrays = {"labels": np.arange(20) % 10, "student/seed0": np.random.default_rng(0).normal(size=(20, 10))}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    (tmp_path / "results.json").write_text(
        json.dumps({"models": {"student": {"history": {"0": []}, "environments": {"0": {}}}}})
    )

    def attempt(chance: random.Random) -> None:
        (tmp_path / "predictions.npz").write_bytes(mutate_bytes(buffer.getvalue(), chance))
        archive.keep("ablation", tmp_path)

    check("predictions.npz", attempt)
