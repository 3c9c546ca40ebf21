"""Programs that a model wrote, run apart from everything else.

What always holds: a process of its own with an empty environment and folder, limits on processor time, wall time, memory, the size
of a file and the number of open files, and an end for it and its children. Where the kernel gives unprivileged namespaces (most
Linux systems) and the processor is x86-64 or ARM64, also: no capability, even if root calls; no socket of any kind, so no network
and no socket of a service; no sight of other processes, for lack of `/proc`, too; and a file system of its own in memory, in which
nothing of the host stands but Python and the system's programs and libraries, read-only. `Outcome.is_isolated` says whether all of
this held, and the task's note says so where it did not. The number of processes is limited, but Linux does not apply that limit to
root. It is no defence against an attacker who knows a hole in the kernel, and none against what a program does to its own tests.

A program passes only if a random token comes back through a pipe of its own, which is written after its last line by the code around
it (sandbox_runner.py); it is in no file, argument, variable or frame that the program can see. A program and its tests are still one
process: one that reads its raw memory (`ctypes`) can find the token, and one that makes its answers equal to everything, changes
what its tests call, or knows them by heart passes them without solving anything.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ftcli.units import MIB

LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
FILE_BYTES = 16 * MIB
PROCESSES = 32
NUM_ERROR_BYTES = 2000


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """It ran to its last line."""
    said: str
    """`passed`, `timed out`, or the last line of what it complained of."""
    is_isolated: bool
    """It had no sockets, no capabilities, no sight of the host's files and processes, and could write nowhere else."""


def run_programs(programs: Sequence[str], *, seconds: float = 10.0, memory_mib: int = 1024) -> list[Outcome]:
    """How each program ends, several at a time.

    Args:
        seconds: of processor time, and of wall time twice as many.
        memory_mib: address space of each process of a program.
    """
    with ThreadPoolExecutor(max_workers=max(1, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(lambda program: run_program(program, seconds=seconds, memory_mib=memory_mib), programs))


def run_program(program: str, *, seconds: float = 10.0, memory_mib: int = 1024) -> Outcome:
    """How one program ends; it passes if it reaches its end, which leaving early with exit code 0 is not."""
    token = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory(prefix="ftcli-code-") as name:
        folder = Path(name)
        (folder / "work").mkdir()
        given = token + b"\n" + program.encode("utf-8", "replace")
        code, said, is_isolated = _launch(folder, given, seconds, memory_mib)
        passed = code == 0 and token in said
        with (folder / "errors").open("rb") as file:
            file.seek(max(0, (folder / "errors").stat().st_size - NUM_ERROR_BYTES))
            errors = file.read().decode("utf-8", "replace").strip()
    if passed:
        return Outcome(True, "passed", is_isolated)
    # 256 - 9 and 256 - 24: killed, or out of processor time.
    if code is None or code in (-signal.SIGKILL & 255, -signal.SIGXCPU & 255):
        return Outcome(False, "timed out", is_isolated)
    return Outcome(False, errors.splitlines()[-1][:500] if errors else f"ended early with exit code {code}", is_isolated)


def _launch(folder: Path, given: bytes, seconds: float, memory_mib: int) -> tuple[int | None, bytes, bool]:
    """(exit code, None after the wall time; what came through the pipe of the result; whether the kernel isolated it)."""
    status, result = os.pipe(), os.pipe()
    numbers = [max(1, round(seconds)), memory_mib * MIB, FILE_BYTES, PROCESSES]
    command = [sys.executable, "-I", "-S", str(LAUNCHER), str(status[1]), str(result[1]), str(folder / "work"), *map(str, numbers)]
    try:
        try:
            with (folder / "output").open("wb") as output, (folder / "errors").open("wb") as errors:
                process = subprocess.Popen(
                    [*command, ":".join(_python_folders())],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=errors,
                    env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
                    pass_fds=[status[1], result[1]],
                    start_new_session=True,
                    cwd=folder / "work",
                )
        finally:
            os.close(status[1])
            os.close(result[1])
        try:
            process.communicate(given, timeout=2 * seconds + 1)
        except subprocess.TimeoutExpired:
            pass
        except BrokenPipeError:
            process.wait()
        code = process.poll()
        _end(process)
        return code, _received(result[0]), _received(status[0]) == b"n"
    finally:
        os.close(status[0])
        os.close(result[0])


def _received(pipe: int) -> bytes:
    """What stands in a pipe; a child that outlived the program where no namespace ends it may still hold the other end."""
    os.set_blocking(pipe, False)
    with suppress(BlockingIOError):
        return os.read(pipe, 1 << 16)
    return b""


def _python_folders() -> list[str]:
    """The folders that Python and its packages stand in, under every name that leads there."""
    binary = Path(sys.executable).resolve().parent.parent
    folders = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.exec_prefix), Path(sys.base_exec_prefix), binary]
    every = {str(form) for folder in folders for form in (folder.absolute(), folder.resolve()) if str(form) != "/"}
    return sorted(every, key=len)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the program with all that it began."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
