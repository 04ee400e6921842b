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
# Names that hide what a definition reaches.
DYNAMIC = {"getattr", "globals", "locals", "vars", "eval", "exec", "__import__", "importlib", "import_module"}


SCRIPT_ONLY = ast.dump(ast.parse("__name__ == '__main__'", mode="eval").body)


class Source(NamedTuple):
    """A Python file: its statements, its lines without comments and docstrings, and the names that it defines."""

    statements: list[ast.stmt]
    lines: list[str]
    own: set[str]  # definitions, and what is imported from other files of the user's

    def text(self, statement: ast.stmt, name: str | None = None) -> str:
        """The lines of a statement that are not blank; of an import, `name` alone."""
        if isinstance(statement, ast.Import | ast.ImportFrom):
            module = f"from {'.' * statement.level}{statement.module} " if isinstance(statement, ast.ImportFrom) else ""
            chosen = [alias for alias in statement.names if name in (None, bound_by(alias)) or alias.name == "*"]
            return "\n".join(f"{module}import {alias.name} as {alias.asname}" for alias in chosen)
        decorators = getattr(statement, "decorator_list", [])
        first = min([statement.lineno, *(decorator.lineno for decorator in decorators)])
        return "\n".join(line for line in self.lines[first - 1 : statement.end_lineno] if line)


def blank(lines: list[str], node: ast.stmt) -> None:
    """Empty the place of a statement. Its columns count bytes."""
    last = (node.end_lineno or node.lineno) - 1
    before = lines[node.lineno - 1].encode()[: node.col_offset].decode()
    after = lines[last].encode()[node.end_col_offset :].decode()
    lines[node.lineno - 1 : last + 1] = [""] * (last - node.lineno + 1) + [before + after]


@cache
def read_source(path: Path) -> Source:
    with tokenize.open(path) as file:  # in its own encoding
        text = file.read()
    tree, lines = ast.parse(text), text.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            blank(lines, node.body[0])
    own = set()
    for statement in tree.body:
        if isinstance(statement, (*DOCUMENTED, ast.Assign, ast.AnnAssign)):
            own |= set(names_bound(statement))
        for alias, module in imports(statement, path):
            if file_of(module) or file_of(f"{module}.{alias.name}"):
                own.add(bound_by(alias))
    return Source(tree.body, [line.rstrip() for line in lines], own)


def bound_by(alias: ast.alias) -> str:
    """The name that an import binds."""
    return (alias.asname or alias.name).partition(".")[0]


def names_bound(statement: ast.stmt) -> list[str]:
    """The names that a statement of a module binds; none for one that does something else."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [bound_by(alias) for alias in statement.names]
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        nodes = [node for target in targets for node in ast.walk(target)]
        if all(isinstance(node, ast.Name | ast.Tuple | ast.List | ast.expr_context) for node in nodes):
            return [node.id for node in nodes if isinstance(node, ast.Name) and node.id != "_"]
    return []


def does_something(statement: ast.stmt, source: Source) -> bool:
    """Whether a statement of a module may change other definitions: Net.width = 3, a loop, a class that registers."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):  # a docstring
        return False
    if isinstance(statement, ast.If) and ast.dump(statement.test) == SCRIPT_ONLY and not statement.orelse:
        return False
    if any(names_used(decorator) & source.own for decorator in getattr(statement, "decorator_list", [])):
        return True
    if isinstance(statement, ast.ClassDef):
        bases = set().union(*map(names_used, statement.bases)) & source.own
        hooks = any("__init_subclass__" in line for line in source.lines)
        return bool(statement.keywords) or (bool(bases) and (hooks or not bases <= defined_in(source)))
    return names_bound(statement) in ([], ["*"])


def defined_in(source: Source) -> set[str]:
    return {name for s in source.statements if isinstance(s, DOCUMENTED) for name in names_bound(s)}


def names_used(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def file_of(module: str) -> Path | None:
    """The file of a module of the user's; None for a library, and for ours except for the soft losses."""
    if module != "engine.soft_losses" and module.partition(".")[0] in (*OURS, *SCRIPTS):
        return None
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imports(statement: ast.stmt, file: Path) -> Iterator[tuple[ast.alias, str]]:
    """What a statement of `file` imports, anywhere in it, with the module that it names in full."""
    package = file.relative_to(ROOT).parent.parts if file.is_relative_to(ROOT) else ()
    for node in ast.walk(statement):
        if isinstance(node, ast.Import):
            yield from ((alias, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            outer = package[: len(package) - node.level + 1] if node.level else ()  # of a relative import
            module = ".".join([*outer, node.module] if node.module else outer)
            yield from ((alias, module) for alias in node.names)


Place = tuple[Path, str | None]  # a file and a name in it; None: all of it; "": only what importing it does


def imported(statement: ast.stmt, name: str | None, file: Path) -> Iterator[Place]:
    """The places in the user's files that a statement imports.

    Importing a file does what its statements do. What is imported by the module itself is followed for `name` alone,
    what a function imports for all names.
    """
    top_level = isinstance(statement, ast.Import | ast.ImportFrom)
    for alias, module in imports(statement, file):
        parents = ["", *(module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1))]
        for package in (module, *parents):
            if package and (found := file_of(package)):
                yield found, ""
        if top_level and name is not None and alias.name != "*" and bound_by(alias) != name:
            continue
        if found := file_of(f"{module}.{alias.name}"):  # a module of a package
            yield found, None
        elif found := file_of(module):
            whole = alias.name == "*" or alias.name == module
            yield found, None if whole else alias.name


def reach(path: Path, name: str | None) -> tuple[list[str], set[str]]:
    """The sources of all that `name` of a file reaches, in order, and the files that had to be taken as a whole.

    A file is taken as a whole where its reach is hidden, as by `getattr`; without a name it is taken so, too.
    """
    parts: set[tuple[Path, int, str]] = set()  # file, line, source
    hidden: set[str] = set()
    waiting: list[Place] = [(path, name)]
    visited = set()
    while waiting:
        place = waiting.pop()
        if place in visited:
            continue
        visited.add(place)
        file, wanted = place
        source = read_source(file)
        for statement in source.statements:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                waiting += [(found, part) for found, part in imported(statement, "", file) if part == ""]
            if wanted is not None and wanted not in names_bound(statement) and not does_something(statement, source):
                continue
            used = names_used(statement)
            if used & DYNAMIC and wanted is not None:
                hidden.add(file.name)
                waiting.append((file, None))
            waiting += [(file, name) for name in used]
            waiting += imported(statement, wanted, file)
            parts.add((file, statement.lineno, source.text(statement, wanted)))
    return [text for _, _, text in sorted(parts) if text], hidden


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
