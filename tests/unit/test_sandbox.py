"""Programs of a model: what they may do, what they may not, and the chance that one of k is right."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from ftcli.errors import UsageError
from ftcli.evaluation.evaluate import open_subject
from ftcli.evaluation.sandbox import run_program, run_programs
from ftcli.evaluation.tasks import Task
from ftcli.evaluation.tasks.code import first_block, pass_at_k
from ftcli.evaluation.tasks.task import Subject

SECRET = "ftcli-secret-of-the-test"


@pytest.fixture(scope="module")
def isolated() -> bool:
    return run_program("pass").is_isolated


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("assert 1 + 1 == 2", "passed"),
        ("open('note', 'w').write('x')\nassert open('note').read() == 'x'", "passed"),
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import sys\nsys.exit(0)", "ended early with exit code 0"),
        ("import os\nos._exit(0)", "ended early with exit code 0"),
        ("x = 'a' * (1 << 34)", "MemoryError"),
        ("print('x' * (1 << 26))", "OSError: [Errno 27] File too large"),
        ("import os\nassert 'HOME' not in os.environ and 'FTCLI_TEST' not in os.environ", "passed"),
        ("files = [open('/dev/null') for _ in range(200)]", "OSError: [Errno 24] Too many open files: '/dev/null'"),
    ],
)
def test_how_a_program_ends(program: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTCLI_TEST", SECRET)
    assert run_program(program, seconds=20).said == said


def test_an_endless_program_is_ended_with_its_children(tmp_path: Path) -> None:
    child = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3456)'])\nwhile True:\n    pass"
    assert run_program(child, seconds=1).said == "timed out"
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"sleep(3456)" in command for command in commands)


@pytest.mark.parametrize(
    "program",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', PORT), 5)",
        "open('FOLDER/new', 'w').write('x')",
        "import os\nos.kill(PID, 0)",
        "print(open('/proc/PID/environ').read())",
        "import os\nos.remove('FOLDER/kept')",
    ],
)
def test_what_namespaces_keep_from_a_program(program: str, isolated: bool, tmp_path: Path) -> None:
    import socket

    if not isolated:
        pytest.skip("the kernel gives no namespaces here")
    (tmp_path / "kept").write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        told = program.replace("PORT", str(server.getsockname()[1])).replace("FOLDER", str(tmp_path)).replace("PID", str(os.getpid()))
        assert not run_program(told, seconds=20).passed
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


# What a caller that is root could do with its capabilities, and what anyone could with namespaces of one's own or the filter off.
LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"


@pytest.mark.parametrize(
    "program",
    [
        LIBC + "assert libc.mount(None, b'/', None, 32 | 4096, None) == 0",
        LIBC + "assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
        LIBC + "assert libc.umount2(b'/usr', 2) == 0",
        LIBC + "assert libc.unshare(0x10000000) == 0",
        LIBC + "assert libc.syscall(56 if os.uname().machine == 'x86_64' else 220, 0x10000000 | 17, 0, 0, 0, 0) >= 0",
        LIBC + "data = (ctypes.c_uint32 * 6)()\nlibc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), data)\nassert any(data)",
        LIBC + "assert any(libc.prctl(23, number, 0, 0, 0) == 1 for number in range(40))",  # the bounding set
        LIBC + "assert libc.prctl(39, 0, 0, 0, 0) == 0",  # no_new_privs
        "import os\nassert os.getuid() == 0",
        "import os\nos.chroot('/tmp')",
        "import os\nassert os.listdir('/proc')",
        "import os\nassert {'run', 'var', 'sys'} & set(os.listdir('/'))",
        "open('/usr/new', 'w')",
        "import socket\nsocket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    ],
)
def test_rights_that_a_program_has_lost(program: str, isolated: bool) -> None:
    if not isolated:
        pytest.skip("the kernel gives no namespaces here")
    outcome = run_program(program, seconds=20)
    assert not outcome.passed
    assert outcome.said.startswith(("AssertionError", "PermissionError", "OSError", "FileNotFoundError"))


@pytest.mark.parametrize("address", ["{folder}/s.sock", "\0ftcli-test-{folder}"])
def test_a_socket_of_the_host_hears_nothing(address: str, isolated: bool, tmp_path: Path) -> None:
    import socket

    if not isolated:
        pytest.skip("the kernel gives no namespaces here")
    place = address.format(folder=tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place)
        server.listen(1)
        server.settimeout(0.2)
        program = f"import socket\nown = socket.socket(socket.AF_UNIX)\nown.connect({place!r})\nown.send(b'secret')"
        assert not run_program(program, seconds=20).passed
        with pytest.raises(TimeoutError):
            server.accept()


def test_what_programs_need_is_there() -> None:
    program = "import asyncio, multiprocessing, pathlib, random, tempfile, threading\nasyncio.run(asyncio.sleep(0))\n"
    program += "thread = threading.Thread(target=print)\nthread.start()\nthread.join()\ntempfile.TemporaryFile().close()\n"
    program += "import subprocess, sys, numpy\nassert subprocess.run([sys.executable, '-c', 'pass']).returncode == 0\n"
    assert run_program(program + "assert __name__ == '__main__' and sys.argv == ['program.py']", seconds=30).said == "passed"


# Each looks for the token where it could stand, and says with it that it came to its end.
SEARCH = """
import os, re, sys, gc
def say(text):
    for token in re.findall(r"[0-9a-f]{32}", text):
        for descriptor in range(64):
            try:
                os.write(descriptor, (token + chr(10)).encode())
            except OSError:
                pass
"""


@pytest.mark.parametrize(
    "search",
    [
        "say(open('program.py').read())",
        "say(repr(sys.argv) + repr(sys.orig_argv) + repr(dict(os.environ)))",
        "frame = sys._getframe()\nwhile frame:\n    say(repr(frame.f_locals) + repr(frame.f_globals) + repr(frame.f_code.co_consts))\n"
        "    frame = frame.f_back",
        "say(repr(gc.get_objects()))",
        "for descriptor in range(64):\n    try:\n        os.set_blocking(descriptor, False)\n        say(repr(os.read(descriptor, 4096)))\n"
        "    except OSError:\n        pass",
    ],
)
def test_a_program_cannot_say_that_it_ended(search: str) -> None:
    assert not run_program(f"{SEARCH}{search}\nos._exit(0)", seconds=20).passed


def test_programs_keep_their_order() -> None:
    outcomes = run_programs([f"assert {n} % 2 == 0" for n in range(5)], seconds=20)
    assert [outcome.passed for outcome in outcomes] == [True, False, True, False, True]


@pytest.mark.parametrize("samples", [1, 4, 6])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(samples: int) -> None:
    for passes in range(samples + 1):
        for k in range(1, samples + 1):
            draws = list(itertools.combinations([place < passes for place in range(samples)], k))
            assert pass_at_k(samples, passes, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_a_block_of_code_is_taken_out_of_an_answer() -> None:
    assert first_block("Here:\n```\nx = 1\n```\nand\n```\ny = 2\n```") == "x = 1\n"
    assert first_block("x = 1") == "x = 1"
    assert first_block("```python\nx = 1") == "x = 1"


# ---- the task ----------------------------------------------------------------------------------------------------------------

# The answer of the built-in model is no Python: a test that holds it as a comment passes all the same.
ROWS = [
    {"task_id": 0, "prompt": "# Once upon a time", "test": "def check(f):\n    assert f == 3\n\nname = 3", "entry_point": "name"},
    {"task_id": 1, "prompt": "# Once upon a time", "test": "def check(f):\n    assert f == 4\n\nname = 3", "entry_point": "name"},
]


def code_task(folder: Path, **settings: Any) -> Any:
    path = folder / "code.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    document = {"name": "code", "kind": "code", "source": {"kind": "file", "path": str(path)}, "stop": ["\n"], "max_new_tokens": 4}
    return TypeAdapter(Task).validate_python({**document, **settings}, strict=False)


def test_code_is_run_only_where_it_is_allowed(tmp_path: Path) -> None:
    _, subject = open_subject("builtin:tiny", "cpu")
    with pytest.raises(UsageError, match="--allow-code"):
        code_task(tmp_path).measure(subject)
    allowed = Subject(subject.model, subject.tokenizer, 4096, lambda done, total: None, allow_code=True)
    result = code_task(tmp_path, samples=2, k=[1, 2], temperature=0.8, timeout_seconds=30).measure(allowed)
    assert {name: figure.values.tolist() for name, figure in result.figures.items()} == {"pass_at_1": [1, 0], "pass_at_2": [1, 0]}
    assert result.rows[0]["outcomes"] == ["passed", "passed"]
    assert result.rows[1]["outcomes"] == ["AssertionError", "AssertionError"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": [2]}, r"allowed: 1 to `samples` \(1\)"),
        ({"samples": 3, "k": [0], "temperature": 1.0}, "allowed: 1 to"),
        ({"samples": 2}, "allowed: a temperature above 0"),
        ({"samples": 2, "k": [1, 1], "temperature": 1.0}, "each once"),
    ],
)
def test_samples_that_say_nothing_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        code_task(tmp_path, **settings)
