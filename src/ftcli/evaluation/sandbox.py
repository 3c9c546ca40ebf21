"""Programs that a model wrote, run apart from everything else.

What always holds: a process of its own with an empty environment and folder, limits on processor time, wall time, memory, the size
of a file and the number of open files, and an end for it and its children. Where the kernel gives unprivileged namespaces (most
Linux systems), also: no network at all, no sight of other processes, and every file system read-only but for its own folder, which
is in memory. Then a program can still read what the user may read, and say nothing of it to anyone. The number of processes is
limited, but Linux does not apply that limit to root. It is no defence against an attacker who knows a hole in the kernel.
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
    """It had no network, and could write nowhere else."""


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
    token = secrets.token_hex(16)
    last = f"\n\nimport sys as _sys\n_sys.stdout.write({token!r} + chr(10))\n_sys.stdout.flush()\n"
    with tempfile.TemporaryDirectory(prefix="ftcli-code-") as name:
        folder = Path(name)
        (folder / "work").mkdir()
        code, is_isolated = _launch(folder, (program + last).encode("utf-8", "replace"), seconds, memory_mib)
        with (folder / "output").open("rb") as file:
            file.seek(max(0, (folder / "output").stat().st_size - 100))
            passed = code == 0 and file.read().endswith(token.encode() + b"\n")
        with (folder / "errors").open("rb") as file:
            file.seek(max(0, (folder / "errors").stat().st_size - NUM_ERROR_BYTES))
            errors = file.read().decode("utf-8", "replace").strip()
    if passed:
        return Outcome(True, "passed", is_isolated)
    # 256 - 9 and 256 - 24: killed, or out of processor time.
    if code is None or code in (-signal.SIGKILL & 255, -signal.SIGXCPU & 255):
        return Outcome(False, "timed out", is_isolated)
    return Outcome(False, errors.splitlines()[-1][:500] if errors else f"ended early with exit code {code}", is_isolated)


def _launch(folder: Path, program: bytes, seconds: float, memory_mib: int) -> tuple[int | None, bool]:
    """(exit code, None after the wall time; whether the kernel isolated it)."""
    read, write = os.pipe()
    numbers = [max(1, round(seconds)), memory_mib * MIB, FILE_BYTES, PROCESSES]
    command = [sys.executable, "-I", "-S", str(LAUNCHER), str(write), str(folder / "work"), *map(str, numbers)]
    try:
        with (folder / "output").open("wb") as output, (folder / "errors").open("wb") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
                pass_fds=[write],
                start_new_session=True,
                cwd=folder / "work",
            )
        os.close(write)
        write = -1
        try:
            process.communicate(program, timeout=2 * seconds + 1)
        except subprocess.TimeoutExpired:
            pass
        except BrokenPipeError:
            process.wait()
        code = process.poll()
        _end(process)
        return code, os.read(read, 1) == b"n"
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the program with all that it began."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
