"""Runs a program that is not trusted to its end, and only then says so: the source of `python -c` in a sandbox.

    python -I -B -c SOURCE TOKEN_FD RESULT_FD

The program is `program.py` in the working folder. The token is read from one pipe and written to the other after the program's last
line. Between the two it stands in no file, argument or variable: only in the iterator that runs the one after the other, which the
frames of the program do not show. What would list it nevertheless (`gc`) is refused.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from types import ModuleType
from typing import Any

PROGRAM = "program.py"


def _steps(token_fd: int, result_fd: int) -> Any:
    """The program and the word that it ended, one after the other, as they are asked for."""

    def refuse(event: str, _: tuple[Any, ...]) -> None:
        if event in {"gc.get_objects", "gc.get_referrers", "gc.get_referents"}:
            raise RuntimeError(f"{event} is not allowed here")

    with open(token_fd, "rb") as file:
        token = file.read()
    with open(PROGRAM, "rb") as file:
        program = compile(file.read(), PROGRAM, "exec", dont_inherit=True)
    module = ModuleType("__main__")
    module.__dict__.update(__file__=PROGRAM, __builtins__=__builtins__)
    sys.modules["__main__"] = module
    sys.argv[:] = [PROGRAM]
    sys.addaudithook(refuse)
    end = compile("write(to, token)", "end", "exec")
    return map(exec, iter([program, end]), iter([module.__dict__, {"write": os.write, "to": result_fd, "token": token}]))


if __name__ == "__main__":
    deque(_steps(int(sys.argv[1]), int(sys.argv[2])), maxlen=0)
