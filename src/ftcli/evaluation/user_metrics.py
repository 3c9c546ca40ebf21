"""Metrics that a user wrote: functions of a Python file that the command line names, and never a recipe.

A function of `(answer, reference, row)` gives a number a row; a function of `(answers, references, rows)` one number of all.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ftcli.errors import DataError, Problem, RequestError, UsageError

OF_ROW, OF_ALL = ("answer", "reference", "row"), ("answers", "references", "rows")
HINT = f"def politeness({', '.join(OF_ROW)}) -> float, or def spread({', '.join(OF_ALL)}) -> float"


@dataclass(frozen=True, slots=True)
class UserMetric:
    """A function of the file."""

    name: str
    path: Path
    line: int
    of_all: bool
    """It takes all rows at once."""
    function: Callable[..., Any]

    def of_row(self, answer: str, references: Sequence[str], row: dict[str, Any], where: str) -> float:
        """Its number of one row; a row with several references gives it the list of them.

        Raises:
            RequestError: it raises, or gives no number; names file, line and row.
        """
        return self._called(where, answer, references[0] if len(references) == 1 else list(references), row)

    def of_rows(self, answers: list[str], references: list[Any], rows: list[dict[str, Any]]) -> float:
        """Its number of all rows."""
        return self._called("all rows", answers, references, rows)

    def _called(self, where: str, *arguments: Any) -> float:
        import math

        try:
            value = self.function(*arguments)
        except KeyboardInterrupt:  # the user's own, at the keyboard
            raise
        except BaseException as error:  # whatever the user's own code raises is told with its line: `sys.exit` would end all, and pass
            line = next(
                (frame.lineno for frame in reversed(traceback.extract_tb(error.__traceback__)) if frame.filename == str(self.path)),
                self.line,
            )
            what = f"{self.path.name}:{line}: {type(error).__name__}: {error}"
            raise RequestError(f"the metric `{self.name}` failed", [Problem(where, what)]) from error
        if isinstance(value, bool) or (hasattr(value, "item") and not isinstance(value, int | float)):
            value = float(value)
        if not isinstance(value, int | float) or not math.isfinite(value):
            what = f"{self.path.name}:{self.line}: gives {value!r}, and no number"
            raise DataError(f"the metric `{self.name}` failed", [Problem(where, what, HINT)])
        return float(value)


def load_user_metrics(path: Path) -> tuple[UserMetric, ...]:
    """The metrics of a file: its functions whose names do not begin with an underscore, and which it does not import.

    Raises:
        UsageError: there is no such file, it cannot be run, or a function takes other arguments.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UsageError(f"--metrics {path}: there is no such file", hint="a Python file with functions")
    module = _run(path)
    found = []
    for name, function in vars(module).items():
        if name.startswith("_") or not inspect.isfunction(function) or function.__module__ != module.__name__:
            continue
        line, arguments = function.__code__.co_firstlineno, tuple(inspect.signature(function).parameters)
        if arguments not in (OF_ROW, OF_ALL):
            what = f"`{name}` takes ({', '.join(arguments)})"
            raise UsageError(f"--metrics {path.name}:{line}: {what}", hint=f"{HINT}; a function of another use begins with _")
        found.append(UserMetric(name, path, line, arguments == OF_ALL, function))
    if not found:
        raise UsageError(f"--metrics {path.name}: defines no function", hint=HINT)
    return tuple(found)


def _run(path: Path) -> ModuleType:
    """The file as a module that nothing else can import."""
    specification = importlib.util.spec_from_file_location("ftcli_user_metrics", path)
    if specification is None or specification.loader is None:
        raise UsageError(f"--metrics {path.name}: is no Python file", hint="its name ends in .py")
    module = importlib.util.module_from_spec(specification)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        specification.loader.exec_module(module)
    except KeyboardInterrupt:  # the user's own, at the keyboard
        raise
    except BaseException as error:  # whatever the user's own code raises is told with its line: `sys.exit` would end all, and pass
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = frames[-1] if frames else getattr(error, "lineno", None) or 1
        raise UsageError(f"--metrics {path.name}:{line}: {type(error).__name__}: {error}") from error
    finally:
        sys.dont_write_bytecode = writes
    return module
