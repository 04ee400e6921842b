"""Which module imports which. Files of the user beside the scripts are free to import what they like."""

import ast
import graphlib
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import report.figures  # noqa: F401 - matplotlib says so on stderr when it builds its font cache, the first time

PACKAGES = ("engine", "report", "experiments", "diagnose", "benchmarks")
SCRIPTS = ("config", "utils", "custom_resnet", "teacher_student_model", "evaluate")
MAY_IMPORT = {
    "engine": {"engine"},
    "report": {"engine", "report"},
    "experiments": {"engine", "report", "experiments"},
    "config": {"engine", "experiments"},
    "utils": {"engine", "config"},
    "custom_resnet": {"engine", "config", "utils"},
    "diagnose": {"diagnose"},
    "teacher_student_model": {"engine", "config", "utils", "custom_resnet", "diagnose"},
    "evaluate": {"engine", "config", "utils", "custom_resnet", "teacher_student_model", "report"},
    "benchmarks": {"engine", "report", *SCRIPTS, "benchmarks"},
}
PATHS = [ROOT / f"{script}.py" for script in SCRIPTS]
PATHS += [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_text(), str(path)) for path in PATHS}


def imported(tree: ast.Module) -> set[str]:
    """Every module that the file imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(TREES)
            names |= submodules or {node.module}
    return names


IMPORTS = {name: imported(tree) for name, tree in TREES.items()}
OWN = {name: names & set(TREES) for name, names in IMPORTS.items()}


@pytest.mark.parametrize("name", TREES)
def test_imports_run_in_one_direction(name):
    package = name.split(".")[0]
    assert {other.split(".")[0] for other in OWN[name]} <= MAY_IMPORT[package]


def test_no_circular_imports():
    order = list(graphlib.TopologicalSorter(OWN).static_order())  # raises CycleError
    assert set(order) == set(TREES)


def test_statistics_imports_nothing_of_this_repository():
    assert not OWN["report.statistics"]
    assert "scipy" in IMPORTS["report.statistics"]


def test_the_file_to_read_needs_torch_and_torchvision_only():
    names = {name.split(".")[0] for name in IMPORTS["benchmarks.reference"]}
    assert names - set(sys.stdlib_module_names) == {"torch", "torchvision"}


def test_every_imported_package_is_in_the_requirements():
    """Those of the user's files and the user's own requirements apart."""
    names = {name.split(".")[0] for names in IMPORTS.values() for name in names}
    packages = {"PIL": "pillow", "sklearn": "scikit-learn"}
    of_the_user = {path.stem for path in ROOT.glob("*.py")}
    used = {packages.get(name, name) for name in names - set(sys.stdlib_module_names) - set(MAY_IMPORT) - of_the_user}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    optional = {"timm", "onnxruntime", "onnxscript"}  # only for arch = timm:NAME and --export onnx
    assert used - optional <= {re.match(r"[\w-]+", line)[0] for line in lines}


def run_python(code: str, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, "-B", "-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_importing_a_module_does_nothing_else(tmp_path):
    """Nothing is printed, no folder made, no device chosen, and no switch or handler of the process changed."""
    code = f"""
import importlib, json, logging, signal
before = [signal.getsignal(number) for number in signal.valid_signals()]
for name in {sorted(TREES)}:
    importlib.import_module(name)
import torch
print(json.dumps({{
    "signals": before == [signal.getsignal(number) for number in signal.valid_signals()],
    "log": logging.getLogger("distillation").handlers,
    "cuda": torch.cuda.is_initialized(),
    "benchmark": torch.backends.cudnn.benchmark,
    "deterministic": torch.are_deterministic_algorithms_enabled(),
}}))
"""
    done = run_python(code, tmp_path)
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    unchanged = {"signals": True, "log": [], "cuda": False, "benchmark": False, "deterministic": False}
    assert json.loads(line) == unchanged
    assert list(tmp_path.rglob("*")) == []
