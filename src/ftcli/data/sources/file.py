"""Rows of local files: jsonl, json, csv, tsv, parquet and txt, each also as .gz or .zst; one file, a glob, or a folder."""

from __future__ import annotations

import difflib
import functools
import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from ftcli.data.sources.json_rows import read_json, read_jsonl
from ftcli.data.sources.tables import read_csv, read_parquet, read_tsv
from ftcli.data.sources.texts import read_txt
from ftcli.errors import DataError, Problem
from ftcli.spec import LocalPath, Spec

Rows = Iterator[tuple[int, dict[str, Any]]]
_COMPRESSIONS = (".gz", ".zst")
_READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}
_TEXT_SUFFIX = ".txt"
_SUFFIXES = (*_READERS, _TEXT_SUFFIX)


class File(Spec):
    """Rows of local files, read one after the other in the order of their names."""

    kind: Literal["file"] = "file"
    path: LocalPath
    """A file (jsonl, json, csv, tsv, parquet, txt; also .gz, .zst), a glob such as `data/**/*.jsonl`, or a folder of such files."""
    split: Literal["file", "paragraph", "line"] = "file"
    """What a row of a txt file is. A file is the only boundary that is surely meant, so the whole file is one text unless told
    otherwise; `paragraph` cuts at blank lines, `line` at every line."""

    def label(self) -> str:
        path = Path(self.path)
        if path.is_dir() or not glob.has_magic(path.name):
            return _stem(path)
        pattern = _stem(path).strip("*?[]-_. ")
        return pattern or next((part for part in reversed(path.parent.parts) if not glob.has_magic(part)), "files")

    def files(self) -> list[Path]:
        """The files, sorted by name.

        Raises:
            DataError: there is none, or they are of several kinds or of an unknown one.
        """
        return _find(self.path)

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, row) of every row, in order; where is the file and the line the row begins on, or its number in parquet.

        Raises:
            DataError: a file or a row cannot be read.
        """
        files = self.files()
        root = files[0].parent if len(files) == 1 else Path(os.path.commonpath([file.parent for file in files]))
        for file in files:
            name = str(file.relative_to(root))
            number = None
            for number, row in self._reader(file)(file, name):
                yield f"{name}:{number}", row
            if number is None:
                raise DataError("a data file is empty", [Problem(name, "has no rows")])

    def fingerprint(self) -> str:
        """sha256 over the bytes of the files and how they are read."""
        digest = hashlib.sha256(self.split.encode())
        for file in self.files():
            status = file.stat()
            digest.update(f"{_suffix(file)}:{_hash_file(str(file), status.st_size, status.st_mtime_ns, status.st_ino)}\n".encode())
        return digest.hexdigest()

    def _reader(self, file: Path) -> Callable[[Path, str], Rows]:
        suffix = _suffix(file)
        return functools.partial(read_txt, split=self.split) if suffix == _TEXT_SUFFIX else _READERS[suffix]


@functools.lru_cache(maxsize=4096)
def _hash_file(path: str, size: int, modified: int, inode: int) -> str:
    """sha256 of a file; its size, time and inode are part of the call so that a changed file is read again."""
    from ftcli.data.cache import default_cache_folder
    from ftcli.data.file_hashes import sha256_of_file

    return sha256_of_file(Path(path), default_cache_folder())


def _suffix(path: Path) -> str:
    """The suffix that names the kind of a file, without that of its compression."""
    bare = path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path
    return bare.suffix.lower()


def _stem(path: Path) -> str:
    """The file's name without the suffixes that ftcli knows."""
    name = path.name
    for suffixes in (_COMPRESSIONS, _SUFFIXES):
        name = next((name[: -len(suffix)] for suffix in suffixes if name.lower().endswith(suffix) and name.lower() != suffix), name)
    return name


def _find(text: str) -> list[Path]:
    path = Path(text)
    if path.is_file():
        return _checked([path], text)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _suffix(file) in _SUFFIXES)
        if not files:
            hint = "a glob such as `**/*.jsonl` reads its subfolders"
            raise _no_file(text, f"the folder has no data file ({', '.join(_SUFFIXES)})", hint)
        return _checked(files, text)
    if glob.has_magic(text):
        files = sorted(Path(match) for match in glob.glob(text, recursive=True) if os.path.isfile(match))
        if not files:
            raise _no_file(text, "no file matches", _nearest(path))
        return _checked(files, text)
    raise _no_file(text, "there is no such file", _nearest(path))


def _checked(files: list[Path], text: str) -> list[Path]:
    """The files, all of one known kind: a README among data files would be trained on."""
    unknown = [file for file in files if _suffix(file) not in _SUFFIXES]
    if unknown:
        what = f"`{unknown[0].name}` is of an unknown kind"
        raise _no_file(text, what, f"known are {', '.join(_SUFFIXES)}, each also with {' or '.join(_COMPRESSIONS)}")
    kinds = Counter(_suffix(file) for file in files)
    if len(kinds) > 1:
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        raise _no_file(text, f"files of several kinds: {counted}", f"a glob such as `*{kinds.most_common(1)[0][0]}` picks one kind")
    return files


def _nearest(path: Path) -> str | None:
    """The hint for a path that leads nowhere: the nearest name in its folder, or the first part that is missing."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    wanted = path.relative_to(folder).parts[0]
    near = difflib.get_close_matches(wanted, sorted(os.listdir(folder)), n=1, cutoff=0.5)
    if near:
        return f"did you mean `{folder / near[0]}`?"
    if folder != path.parent and not glob.has_magic(wanted):
        return f"there is no folder `{folder / wanted}`"
    names = sorted(file.name for file in folder.iterdir() if _suffix(file) in _SUFFIXES)
    return f"data files in `{folder}`: {', '.join(names[:5])}" if names else None


def _no_file(text: str, what: str, hint: str | None) -> DataError:
    return DataError("a data file cannot be read", [Problem(text, what, hint)])
