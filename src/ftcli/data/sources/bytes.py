"""A file's bytes, decompressed, as lines or chunks of UTF-8 text, with the place named where they are not."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from ftcli.errors import DataError, MissingExtraError, Problem

_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
CHUNK_BYTES = 1 << 20


def unreadable(where: str, what: str, hint: str | None = None) -> DataError:
    return DataError("a data file cannot be read", [Problem(where, what, hint)])


@contextmanager
def open_bytes(path: Path, name: str) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed when its name ends in .gz or .zst.

    Raises:
        DataError: it cannot be opened or decompressed, or it is empty.
    """
    suffix = path.suffix.lower()
    try:
        if path.stat().st_size == 0:
            raise unreadable(name, "is empty")
        if suffix == ".gz":
            with gzip.open(path, "rb") as file:
                yield cast(IO[bytes], file)
        elif suffix == ".zst":
            with _open_zst(path) as stream:
                yield stream
        else:
            with path.open("rb") as plain:
                yield plain
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise unreadable(name, f"is not a whole gzip file: {error}") from error
    except OSError as error:
        raise unreadable(name, f"cannot be read: {error.strerror or error}") from error


@contextmanager
def _open_zst(path: Path) -> Iterator[IO[bytes]]:
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError(f"reading `{path.name}`", "zst") from error
    import io

    try:
        with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream:
            yield io.BufferedReader(stream, CHUNK_BYTES)
    except zstandard.ZstdError as error:
        raise unreadable(path.name, f"is not a whole zstd file: {error}") from error


def read_lines(path: Path, name: str) -> Iterator[str]:
    """The lines of a UTF-8 file with their line ends, without a byte order mark; only LF ends a line.

    Raises:
        DataError: a line is not UTF-8; names the line and the byte.
    """
    offset = 0
    with open_bytes(path, name) as file:
        for number, line in enumerate(file, start=1):
            content = _without_bom(line, name) if number == 1 else line
            try:
                yield content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(content, error.start, offset + len(line) - len(content), number, name) from error
            offset += len(line)


def read_chunks(path: Path, name: str) -> Iterator[str]:
    """A UTF-8 file in pieces of about `CHUNK_BYTES`, without a byte order mark; for files that need not have lines.

    Raises:
        DataError: it is not UTF-8; names the line and the byte.
    """
    line = 1
    with open_bytes(path, name) as file:
        head = file.read(len(_BOM))
        rest = _without_bom(head, name)
        offset = len(head) - len(rest)
        while True:
            read = file.read(CHUNK_BYTES)
            block = rest + read
            if not block:
                return
            try:
                text, rest = block.decode("utf-8"), b""
            except UnicodeDecodeError as error:
                # A character has at most 4 bytes, and may go on in the next chunk
                if not read or error.start < len(block) - 3:
                    raise _not_utf8(block, error.start, offset, line + block.count(b"\n", 0, error.start), name) from error
                text, rest = block[: error.start].decode("utf-8"), block[error.start :]
            offset += len(block) - len(rest)
            line += text.count("\n")
            yield text


def _without_bom(data: bytes, name: str) -> bytes:
    encoding = _OTHER_BOMS.get(data[:2])
    if encoding is not None:
        raise unreadable(name, f"is {encoding}, not UTF-8", _convert_hint(encoding, name))
    return data.removeprefix(_BOM)


def _not_utf8(data: bytes, at: int, offset: int, line: int, name: str) -> DataError:
    """The error for bytes that are not UTF-8, with what they look like."""
    around = data[max(0, at - 40) : at + 40]
    if b"\0" in around:
        guess = "UTF-16"
    elif any(byte in range(0x80, 0xA0) for byte in around):
        guess = "windows-1252"
    else:
        guess = "latin-1"
    what = f"byte 0x{data[at]:02x} at offset {offset + at} is not UTF-8"
    shown = around.decode({"windows-1252": "cp1252", "latin-1": "latin-1", "UTF-16": "latin-1"}[guess], "replace").strip()
    return unreadable(f"{name}:{line}", f"{what}; it looks like {guess}: {shown!r}", _convert_hint(guess, name))


def _convert_hint(encoding: str, name: str) -> str:
    return f"`iconv -f {encoding} -t utf-8 {name} > utf8-{Path(name).name}` converts it"
