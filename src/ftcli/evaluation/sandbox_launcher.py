"""Runs in a process of its own, before a program that is not trusted: takes away what the kernel lets it take away, then becomes it.

    python -I -S sandbox_launcher.py STATUS_FD FOLDER CPU_SECONDS MEMORY_BYTES FILE_BYTES PROCESSES < program

Imports nothing but the standard library. One letter goes to STATUS_FD: `n` where the program has its own namespaces (no network,
no other processes, every file system read-only but for an empty folder in memory), `l` where the kernel refused and only limits hold.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys

NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x00020000  # user, network, processes, IPC, mounts
MS_PRIVATE, MS_REC = 1 << 18, 1 << 14
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1


class _MountAttributes(ctypes.Structure):
    """`struct mount_attr` of the kernel."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


def _checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), "the kernel refused")


def _set_read_only(libc: ctypes.CDLL, place: str, read_only: bool) -> None:
    attributes = _MountAttributes(MOUNT_ATTR_RDONLY if read_only else 0, 0 if read_only else MOUNT_ATTR_RDONLY, 0, 0)
    flags = AT_RECURSIVE if read_only else 0
    _checked(libc.syscall(MOUNT_SETATTR, AT_FDCWD, place.encode(), flags, ctypes.byref(attributes), ctypes.sizeof(attributes)))


def isolate(folder: str, file_bytes: int) -> bool:
    """Own namespaces, where the kernel allows it; the caller has to fork for the one of processes to hold."""
    user, group = os.getuid(), os.getgid()
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        _checked(libc.unshare(NEW_NAMESPACES))
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        _checked(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
        _checked(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={4 * file_bytes},mode=700".encode()))
        _set_read_only(libc, "/", True)
        _set_read_only(libc, folder, False)
    except (OSError, AttributeError):
        return False
    return True


def limit(cpu_seconds: int, memory_bytes: int, file_bytes: int, processes: int) -> None:
    """Limits that the program cannot raise."""
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: processes,
    }
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))


def main() -> None:
    status, folder = int(sys.argv[1]), sys.argv[2]
    cpu_seconds, memory_bytes, file_bytes, processes = map(int, sys.argv[3:7])
    program = sys.stdin.buffer.read()
    is_isolated = isolate(folder, file_bytes)
    os.write(status, b"n" if is_isolated else b"l")
    os.close(status)
    # Twice: the first process of a namespace takes no signal from inside, not even that its time is up, and with it all others end.
    for _ in range(2):
        if child := os.fork():
            _, state = os.waitpid(child, 0)
            os._exit(os.waitstatus_to_exitcode(state) & 255)
    os.chdir(folder)
    with open("program.py", "wb") as file:
        file.write(program)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    limit(cpu_seconds, memory_bytes, file_bytes, processes)
    os.execv(sys.executable, [sys.executable, "-I", "-B", "program.py"])


if __name__ == "__main__":
    main()
