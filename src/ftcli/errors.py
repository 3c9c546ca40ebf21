"""What a user is told when something is wrong, and the exit code that goes with it.

An `FtcliError` is printed as text, without a traceback. Anything else that escapes is a bug of ftcli.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EXIT_FINE = 0
EXIT_RUN_FAILED = 1
EXIT_REQUEST_WRONG = 2
EXIT_GATE_FAILED = 3
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command with --resume goes on


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where, what (with the value found), and a hint that can be acted on."""

    where: str
    what: str
    hint: str | None = None

    def __str__(self) -> str:
        text = f"  {self.where}: {self.what}" if self.where else f"  {self.what}"
        return text if self.hint is None else f"{text}\n    hint: {self.hint}"


class FtcliError(Exception):
    """The root of every error that is printed to the user as it is.

    Args:
        summary: one line, lower case, no full stop; what was asked and could not be done.
        problems: every single thing that is wrong, all at once.
        hint: what to do, when there are no separate problems to hang hints on.
    """

    exit_code = EXIT_RUN_FAILED

    def __init__(self, summary: str, problems: Iterable[Problem] = (), hint: str | None = None) -> None:
        self.summary = summary
        self.problems = tuple(problems)
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [self.summary]
        if self.hint is not None:
            parts.append(f"  hint: {self.hint}")
        parts += ["", *"\n\n".join(map(str, self.problems)).split("\n")] if self.problems else []
        return "\n".join(parts)


class RequestError(FtcliError):
    """The request was wrong: nothing was trained, nothing was written."""

    exit_code = EXIT_REQUEST_WRONG


class RecipeError(RequestError):
    """The recipe is wrong."""


class DataError(RequestError):
    """A row, file or column is not what the recipe says it is."""


class UsageError(RequestError):
    """The command line is wrong."""


class MissingExtraError(RequestError):
    """Something optional is asked for and not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs a package that is not installed", hint=f'pip install "ftcli[{extra}]"')


class RunError(FtcliError):
    """The run failed after it had begun."""


class GateError(FtcliError):
    """A proof or a gate did not hold."""

    exit_code = EXIT_GATE_FAILED


class InterruptedRun(FtcliError):
    """The run was stopped from outside and has saved all it needs to go on."""

    exit_code = EXIT_INTERRUPTED


def did_you_mean(word: str, allowed: Sequence[str]) -> str | None:
    """The hint for a misspelt word, or None if nothing allowed is near it.

    Example:
        >>> did_you_mean("rnak", ["rank", "alpha"])
        'did you mean `rank`?'
    """
    near = difflib.get_close_matches(word, allowed, n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else None
