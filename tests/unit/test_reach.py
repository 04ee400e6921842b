"""Which edits of a file change the digest of one of its definitions."""

import pytest

from engine import reach

FILE = '''
"""A module."""
import math
from helper import scale, unused_there
import whole

LIMIT = 3  # a constant


class Base:
    factor = 2


class Loss(Base):
    """A loss."""

    def __call__(self, x):
        return scale(x) * self.factor + LIMIT + whole.offset()


def other(x):
    return math.sqrt(x)


def local(x):
    from nested import inner

    return inner(x)


def dynamic(x):
    return globals()["other"](x)


table = [1, 2]
table.append(3)


def uses_table():
    return sum(table)


if __name__ == "__main__":
    print(other(2))
'''
HELPER = "def scale(x):\n    return x * FACTOR\n\n\nFACTOR = 2\n\n\ndef unused_there():\n    return 0\n"
WHOLE = "def offset():\n    return 1\n"
NESTED = "def inner(x):\n    return x\n\n\ndef apart():\n    return 2\n"
FILES = {"mine.py": FILE, "helper.py": HELPER, "whole.py": WHOLE, "nested.py": NESTED}


@pytest.fixture
def digest_of(tmp_path, monkeypatch):
    monkeypatch.setattr(reach, "ROOT", tmp_path)

    def digest(name: str, files=FILES) -> str:
        for file, text in files.items():
            (tmp_path / file).write_text(text)
        reach.read_source.cache_clear()
        return reach.digest(reach.reach(tmp_path / "mine.py", name)[0])

    yield digest
    reach.read_source.cache_clear()


EDITS = [  # file, before, after, the definitions that it changes
    ("mine.py", "# a constant", "# another comment", ""),
    ("mine.py", '"""A loss."""', '"""The loss,\n\n    at length."""', ""),
    ("mine.py", '"""A module."""', "", ""),
    ("mine.py", "\n\n\ndef other", "\n\n\n\n\ndef other", ""),
    ("mine.py", "print(other(2))", "print(other(3))", "dynamic"),
    ("mine.py", "LIMIT = 3", "LIMIT = 4", "Loss dynamic"),
    ("mine.py", "factor = 2", "factor = 3", "Loss dynamic"),
    ("mine.py", "self.factor +", "self.factor -", "Loss dynamic"),
    ("mine.py", "math.sqrt(x)", "math.exp(x)", "other dynamic"),
    ("mine.py", "table.append(3)", "table.append(4)", "Loss other local dynamic uses_table"),  # may do anything
    ("helper.py", "x * FACTOR", "x / FACTOR", "Loss dynamic"),
    ("helper.py", "FACTOR = 2", "FACTOR = 5", "Loss dynamic"),
    ("helper.py", "return 0", "return 1", "dynamic"),
    ("whole.py", "return 1", "return 2", "Loss dynamic"),
    ("nested.py", "return x", "return -x", "local dynamic"),
    ("nested.py", "return 2", "return 3", ""),
]


@pytest.mark.parametrize(("file", "before", "after", "changed"), EDITS)
def test_an_edit_changes_what_reaches_it_and_nothing_else(digest_of, file, before, after, changed):
    names = ["Loss", "other", "local", "dynamic", "uses_table"]
    first = {name: digest_of(name) for name in names}
    assert before in FILES[file]
    edited = {**FILES, file: FILES[file].replace(before, after)}
    assert {name for name in names if digest_of(name, edited) != first[name]} == set(changed.split())


def test_a_hidden_reach_is_said(digest_of, tmp_path):
    digest_of("dynamic")
    assert reach.reach(tmp_path / "mine.py", "dynamic")[1] == {"mine.py"}
    assert reach.reach(tmp_path / "mine.py", "Loss")[1] == set()


def test_star_imports_and_packages_are_followed(digest_of, tmp_path):
    (tmp_path / "lib").mkdir()
    files = {
        "mine.py": "from helper import *\nfrom lib.parts import part\n\n\ndef f(x):\n    return scale(x) + part()\n",
        "helper.py": HELPER,
        "lib/__init__.py": "",
        "lib/parts.py": "from .deeper import value\n\n\ndef part():\n    return value\n",
        "lib/deeper.py": "value = 1\n",
    }
    first = digest_of("f", files)
    for file, before, after in [
        ("helper.py", "x * FACTOR", "x"),
        ("lib/parts.py", "return value", "return -value"),
        ("lib/deeper.py", "value = 1", "value = 2"),
    ]:
        assert digest_of("f", {**files, file: files[file].replace(before, after)}) != first
    assert digest_of("f", files) == first


REGISTRY = """
REG = {}


def register(function):
    REG[function.__name__] = function
    return function


@register
def tiny(x):
    return x + 1


class Base:
    def __init_subclass__(cls):
        REG[cls.__name__] = cls


class Small(Base):
    size = 3


def f(x):
    return REG["tiny"](x)
"""
OF_AN_OBJECT = """
B = Blocks()


@B.register
def head(n):
    return n


def f(n):
    return B["head"](n)
"""
UNLESS = """
x = 1
if __name__ != "main":
    x = 2


def f():
    return x
"""
SHOWN = "def f(n): 'a text'; return 1\n"


@pytest.mark.parametrize(
    ("files", "file", "before", "after"),
    [
        ({"mine.py": REGISTRY}, "mine.py", "x + 1", "x + 2"),
        ({"mine.py": REGISTRY}, "mine.py", "size = 3", "size = 4"),
        (
            {"mine.py": "import nets\nREG = nets.REG\n\ndef f(x):\n    return REG\n", "nets.py": REGISTRY},
            "nets.py",
            "+ 1",
            "",
        ),
        ({"mine.py": "import other\n\ndef f(x):\n    return x\n", "other.py": REGISTRY}, "other.py", "x + 1", "x + 2"),
        (
            {"mine.py": "import torch\n_ = torch.manual_seed(1)\n\ndef f(x):\n    return x\n"},
            "mine.py",
            "seed(1)",
            "seed(2)",
        ),
        (
            {
                "mine.py": "from lib.a import f\n",
                "lib/__init__.py": "import os\nos.x = 1\n",
                "lib/a.py": "def f(): 1\n",
            },
            "lib/__init__.py",
            "1",
            "2",
        ),
        ({"mine.py": "x = 1\n\x0c\ny = 2\n\ndef f():\n    return y\n"}, "mine.py", "y = 2", "y = 3"),
        ({"mine.py": OF_AN_OBJECT}, "mine.py", "return n\n", "return 2 * n\n"),
        ({"mine.py": UNLESS}, "mine.py", "x = 2", "x = 3"),
        ({"mine.py": SHOWN}, "mine.py", "return 1", "return 2"),
        ({"mine.py": "def f():\n    return a\n\na = 1\na = 2\n"}, "mine.py", "a = 1\na = 2", "a = 2\na = 1"),
    ],
)
def test_what_works_behind_a_definition_is_reached(digest_of, tmp_path, files, file, before, after):
    (tmp_path / "lib").mkdir()
    assert before in files[file]
    assert digest_of("f", {**files, file: files[file].replace(before, after)}) != digest_of("f", files)


def test_what_is_imported_beside_changes_nothing(digest_of):
    files = {"mine.py": "from torch import nn\n\n\ndef f():\n    return nn.Linear(1, 1)\n"}
    assert digest_of("f", {"mine.py": files["mine.py"].replace("nn\n", "nn, optim\n", 1)}) == digest_of("f", files)
    assert digest_of("f", {"mine.py": "\ufeff" + files["mine.py"]}) == digest_of("f", files)


def test_two_files_that_import_one_another_end(digest_of):
    files = {
        "mine.py": "import helper\n\n\ndef f():\n    return helper.g()\n",
        "helper.py": "import mine\n\n\ndef g():\n    return mine.f\n",
    }
    assert digest_of("f", files) == digest_of("f", files)


def test_our_training_code_is_digested_without_its_messages(tmp_path, monkeypatch):
    """A comment, a docstring, a log line or an error message changes nothing, a number does."""
    files = {name: (reach.ROOT / name).read_text() for name in reach.TRAINING}
    monkeypatch.setattr(reach, "ROOT", tmp_path)

    def digest(**edits: tuple[str, str]) -> str:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            before, after = edits.get(path.stem, ("", ""))
            assert before in text
            path.write_text(text.replace(before, after, 1) if before else text)
        reach.read_source.cache_clear()
        reach.code_digest.cache_clear()
        return reach.code_digest()

    try:
        first = digest()
        assert digest(custom_resnet=('"""Train the models', '"""Trains the models')) == first
        assert digest(models=('raise UserError(f"arch', 'raise UserError(f"the arch')) == first
        assert digest(training=("share < suggested", "share > suggested")) != first
        assert digest(soft_losses=("return temperature**2 * kl", "return temperature**3 * kl")) != first
    finally:
        monkeypatch.undo()
        reach.read_source.cache_clear()
        reach.code_digest.cache_clear()
