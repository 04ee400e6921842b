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
