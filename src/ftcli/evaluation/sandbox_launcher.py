"""Runs in a process of its own, before a program that is not trusted: takes away what the kernel lets it take away, then becomes it.

    python -I -S sandbox_launcher.py STATUS_FD RESULT_FD FOLDER CPU_SECONDS MEMORY_BYTES FILE_BYTES PROCESSES SHOWN < token and program

Imports nothing but the standard library. SHOWN are the folders that Python needs, apart by colons. One letter goes to STATUS_FD: `n`
where all of this holds, `l` where the kernel refused a part of it: namespaces of its own (network, processes, IPC, mounts), a root in
memory that shows nothing but SHOWN and the system's libraries, read-only, and no `/proc`; no capability; no system call of BLOCKED.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
from pathlib import Path

# User, network, processes, IPC, mounts, host name.
NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x00020000 | 0x04000000
MS_NO_SUID, MS_NO_DEVICES, MS_BIND, MS_PRIVATE, MS_REC = 2, 4, 1 << 12, 1 << 18, 1 << 14
DETACH = 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY_NO_SUID = 442, -100, 0x8000, 1 | 2
# Nobody: whoever calls is no root in there, so that a capability does not come back with the next program.
INNER_ID = 65534
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
WORK = "/work"

PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 4, 22, 24, 38, 47
CAPABILITY_VERSION, NUM_CAPABILITIES = 0x20080522, 64
EPERM, ENOSYS = 1, 38
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NAMESPACE_FLAGS = 0x7E020000
X32 = 0x40000000
CLONE3 = 435
# By processor: its number for filters, `clone`, and then every call that opens a way out: sockets (a virtual machine's reach its host
# through every namespace), namespaces and mounts, other processes' memory, keys, and large parts of the kernel that programs need not.
BLOCKED = {
    "x86_64": (0xC000003E, 56, (41, 101, 155, 161, 165, 166, 175, 176, 246, 248, 249, 250, 272, 298, 304, 308, 310, 311, 313, 321, 323)),
    "aarch64": (0xC00000B7, 220, (198, 117, 41, 51, 40, 39, 105, 106, 104, 217, 218, 219, 97, 241, 265, 268, 270, 271, 273, 280, 282)),
}
BLOCKED_EVERYWHERE = (425, 428, 429, 430, 431, 432, 433, 438, 442, 467)


class _MountAttributes(ctypes.Structure):
    """`struct mount_attr` of the kernel."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


class _Filter(ctypes.Structure):
    """`struct sock_fprog` of the kernel."""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def _checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), "the kernel refused")


def isolate(libc: ctypes.CDLL, root: str, file_bytes: int, shown: list[str]) -> bool:
    """Own namespaces and a root of its own, where the kernel allows it; the caller has to fork for the one of processes to hold."""
    user, group = os.getuid(), os.getgid()
    try:
        _checked(libc.unshare(NEW_NAMESPACES))
        maps = (("setgroups", "deny"), ("uid_map", f"{INNER_ID} {user} 1"), ("gid_map", f"{INNER_ID} {group} 1"))
        for name, text in maps:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        _checked(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
        size = f"size={4 * file_bytes},mode=755".encode()
        _checked(libc.mount(b"tmpfs", root.encode(), b"tmpfs", MS_NO_SUID | MS_NO_DEVICES, size))
        for name in (WORK, "/tmp"):
            os.mkdir(root + name)
        for place in dict.fromkeys((*SYSTEM, *DEVICES, *shown)):
            _show(libc, root, place)
        os.chdir(root)
        _checked(libc.pivot_root(b".", b"."))
        _checked(libc.umount2(b".", DETACH))
        os.chdir("/")
    except (OSError, AttributeError):
        return False
    return os.access(sys.executable, os.X_OK)


def _show(libc: ctypes.CDLL, root: str, place: str) -> None:
    """A file or folder of the system, read-only, in the new root; a link stays a link."""
    inside = root + place
    if place == "/" or not os.path.lexists(place) or os.path.lexists(inside):
        return
    os.makedirs(os.path.dirname(inside), exist_ok=True)
    if os.path.islink(place):
        os.symlink(os.readlink(place), inside)
        return
    if os.path.isdir(place):
        os.mkdir(inside)
    else:
        os.close(os.open(inside, os.O_CREAT | os.O_WRONLY, 0o600))
    _checked(libc.mount(place.encode(), inside.encode(), None, MS_BIND | MS_REC, None))
    attributes = _MountAttributes(READ_ONLY_NO_SUID, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    _checked(libc.syscall(MOUNT_SETATTR, AT_FDCWD, inside.encode(), AT_RECURSIVE, ctypes.byref(attributes), size))


def give_up_rights(libc: ctypes.CDLL) -> bool:
    """No capability, none to come back, and no system call that opens a way out; what is refused is left out."""
    for capability in range(NUM_CAPABILITIES):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc.prctl(PR_CAP_AMBIENT, 4, 0, 0, 0)  # clears all
    try:
        _checked(libc.capset(struct.pack("=Ii", CAPABILITY_VERSION, 0), bytes(24)))
        _checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        code = _filter_code()
        if code is None:
            return False
        _checked(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(_Filter(len(code) // 8, code)), 0, 0))
    except (OSError, AttributeError):
        return False
    return True


def _filter_code() -> bytes | None:
    """The filter of system calls, `struct sock_filter` each 8 bytes; None for a processor that is not known."""
    known = BLOCKED.get(os.uname().machine)
    if known is None or sys.maxsize < 2**32:
        return None
    processor, clone, calls = known
    refused = RETURN, 0, 0, REFUSE | EPERM
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, processor), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0), (AT_LEAST, 0, 1, X32), refused]
    for call in (*calls, *BLOCKED_EVERYWHERE):
        code += [(EQUAL, 0, 1, call), refused]
    # What it asks for stands in memory, where no filter sees it; libraries take `clone` instead.
    code += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, REFUSE | ENOSYS)]
    code += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, 16), (ANY_BIT, 0, 1, NAMESPACE_FLAGS), refused, (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *one) for one in code)


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


def _wait_for_child() -> None:
    """Return in a new process; the old one waits for it, and ends as it did."""
    if child := os.fork():
        _, state = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(state) & 255)


def main() -> None:
    status, result, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    cpu_seconds, memory_bytes, file_bytes, processes = map(int, sys.argv[4:8])
    token, _, program = sys.stdin.buffer.read().partition(b"\n")
    runner = Path(__file__).with_name("sandbox_runner.py").read_text(encoding="utf-8")
    libc = ctypes.CDLL(None, use_errno=True)
    is_isolated = isolate(libc, folder, file_bytes, sys.argv[8].split(":"))
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # the program cannot look into those that wait for it
    _wait_for_child()
    # Again: the first process of a namespace takes no signal from inside, not even that its time is up, and with it all others end.
    _wait_for_child()
    os.chdir(WORK if is_isolated else folder)
    with open("program.py", "wb") as file:
        file.write(program)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    token_fd, into = os.pipe()
    os.write(into, token)
    os.close(into)
    for descriptor in (token_fd, result):
        os.set_inheritable(descriptor, True)
    limit(cpu_seconds, memory_bytes, file_bytes, processes)
    has_no_rights = give_up_rights(libc)
    os.write(status, b"n" if is_isolated and has_no_rights else b"l")
    os.close(status)
    os.execv(sys.executable, [sys.executable, "-I", "-B", "-c", runner, str(token_fd), str(result)])


if __name__ == "__main__":
    main()
