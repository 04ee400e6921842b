"""What a definition depends on: its source, and that of every definition of the user's that it reaches.

A digest of this text says whether an edit can have changed what the definition does. Comments, docstrings and blank
lines are left out. The text is cut out of the files, because a syntax tree is printed differently by different versions
of Python. A file is read once: an edit during a run does not change what the run has imported.
"""

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
OURS = ("benchmarks", "diagnose", "engine", "experiments", "report", "tests")
SCRIPTS = ("config", "custom_resnet", "evaluate", "teacher_student_model", "utils")
DOCUMENTED = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
DYNAMIC = {"getattr", "globals", "locals", "vars", "eval", "exec", "__import__", "importlib"}  # hide what is reached


class Source(NamedTuple):
    """A Python file: its statements, and its lines without comments and docstrings."""

    statements: list[ast.stmt]
    lines: list[str]

    def text(self, node: ast.stmt | None = None) -> str:
        """The lines of a statement, or of the whole file, that are not blank."""
        lines = self.lines
        if node:
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            lines = lines[first - 1 : node.end_lineno]
        return "\n".join(line for line in lines if line)


def blank(lines: list[str], statement: ast.stmt) -> None:
    """Empty the lines of a statement."""
    span = slice(statement.lineno - 1, statement.end_lineno)
    lines[span] = [""] * len(lines[span])


@cache
def read_source(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            blank(lines, node.body[0])
    return Source(tree.body, [line.rstrip() for line in lines])


def names_bound(statement: ast.stmt) -> list[str]:
    """The names that a statement of a module does nothing but bind."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        names = [(alias.asname or alias.name).partition(".")[0] for alias in statement.names]
        return names if names != ["*"] else []
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        nodes = [node for target in targets for node in ast.walk(target)]
        if all(isinstance(node, ast.Name | ast.Tuple | ast.List | ast.expr_context) for node in nodes):
            return [node.id for node in nodes if isinstance(node, ast.Name)]
    return []


def does_something(statement: ast.stmt) -> bool:
    """Whether a statement of a module may change any of its definitions: Net.width = 3, a loop, a try."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):  # a docstring
        return False
    if isinstance(statement, ast.If) and "__name__" in names_used(statement.test):  # runs in a script only
        return False
    return not names_bound(statement)


def names_used(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def file_of(module: str) -> Path | None:
    """The file of a module of the user's; None for a library, and for ours except for the soft losses."""
    if module != "engine.soft_losses" and module.partition(".")[0] in (*OURS, *SCRIPTS):
        return None
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imported(statement: ast.stmt, name: str | None, file: Path) -> Iterator[tuple[Path, str | None]]:
    """The user's files that a statement of `file` imports from, with the name that it takes; None: all of the file.

    An import of the module itself is followed for `name` alone, one inside a function for all that it imports.
    """
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(statement):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for alias in node.names:
            bound = (alias.asname or alias.name).partition(".")[0]
            if node is statement and name is not None and bound not in (name, "*"):
                continue
            if isinstance(node, ast.Import):
                if found := file_of(alias.name):
                    yield found, None
                continue
            outer = package[: len(package) - node.level + 1] if node.level else ()  # of a relative import
            module = ".".join([*outer, node.module] if node.module else outer)
            if found := file_of(f"{module}.{alias.name}"):
                yield found, None
            elif found := file_of(module):
                yield found, None if alias.name == "*" else alias.name


def reach(path: Path, name: str | None) -> tuple[list[str], set[str]]:
    """The sources of all that `name` of a file reaches, in order, and the files that had to be taken as a whole.

    A file is taken as a whole where its reach is hidden, as by `getattr`; without a name it is taken so, too.
    """
    parts: dict[tuple[Path, int], str] = {}  # file and line -> source
    hidden: set[str] = set()
    waiting: list[tuple[Path, str | None]] = [(path, name)]
    visited = set()
    while waiting:
        place = waiting.pop()
        if place in visited:
            continue
        visited.add(place)
        file, wanted = place
        source = read_source(file)
        chosen = [s for s in source.statements if wanted is None or wanted in names_bound(s) or does_something(s)]
        for statement in chosen:
            used = names_used(statement)
            if used & DYNAMIC and wanted is not None:
                hidden.add(file.name)
                waiting.append((file, None))
            waiting += [(file, name) for name in used]
            waiting += imported(statement, wanted, file)
            parts[file, statement.lineno] = source.text(statement)
    return [parts[place] for place in sorted(parts) if parts[place]], hidden


def digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# Our code that weights depend on.
TRAINING = (
    "custom_resnet.py",
    "teacher_student_model.py",
    "engine/convolution.py",
    "engine/datasets.py",
    "engine/device.py",
    "engine/distributed.py",
    "engine/images.py",
    "engine/inference.py",
    "engine/models.py",
    "engine/soft_losses.py",
    "engine/sources.py",
    "engine/training.py",
)


def is_message(node: ast.AST) -> bool:
    """Whether a statement only tells something: `raise`, log.info(...)."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return ast.unparse(node.value.func).startswith("log.")
    return isinstance(node, ast.Raise)


@cache
def code_digest() -> str:
    """sha256, shortened, of our training code. An edit of a comment, a docstring or a message does not change it."""
    parts = []
    for name in TRAINING:
        source = read_source(ROOT / name)
        lines = list(source.lines)
        for node in (inner for statement in source.statements for inner in ast.walk(statement)):
            if isinstance(node, ast.stmt) and is_message(node):
                blank(lines, node)
        parts.append("\n".join(line for line in lines if line))
    return digest(parts)[:12]
