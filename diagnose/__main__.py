"""Say what a distillation loss computes: python -m diagnose "FILE.py:NAME(argument=literal, ...)" [logits.npz]

NAME is a function of the student's logits, the teacher's and the labels, and perhaps of keyword arguments, or a class
whose instances are such functions. The npz holds student_logits, teacher_logits (B, C) and labels (B,).
"""

import ast
import importlib
import inspect
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diagnose.loss import Loss, examine


def load(named: str) -> Loss:
    """The loss that FILE:NAME or FILE:NAME(literals) names; a fourth parameter, the temperature, is 4 if not given."""
    location, bracket, literals = named.partition("(")
    file, _, name = location.rpartition(":")
    path = Path(f"{file.removesuffix('.py')}.py").resolve(strict=True)
    call: Any = ast.parse(f"loss({literals}" if bracket else "loss()", mode="eval").body
    arguments = [ast.literal_eval(argument) for argument in call.args]
    keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    sys.path.insert(0, str(path.parent))
    found: Any = getattr(importlib.import_module(path.stem), name)
    if isinstance(found, type):
        return found(*arguments, **keywords)
    fourth = list(inspect.signature(found).parameters.values())[3:4]
    defaults = {parameter.name: 4.0 for parameter in fourth if parameter.default is parameter.empty}
    return partial(found, *arguments, **{**defaults, **keywords})


def main(argv: list[str]) -> int:
    if len(argv) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(examine(load(argv[0]), **(dict(np.load(argv[1])) if argv[1:] else {})))
        return 0
    except (Exception, SystemExit) as error:
        print(f"error: {argv[0]}: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
