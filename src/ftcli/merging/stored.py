"""safetensors files from their headers: what is in them, and any run of elements, read without mapping or loading the rest."""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftcli.errors import Problem, RequestError
from ftcli.merging.documents import read_object
from ftcli.merging.numbers import ITEM_BYTES, STORED, Array, are_finite, to_float32

_SCANNED = 2**20  # bytes looked at at once
_MAX_HEADER = 100 * 2**20  # the format's own limit
INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor is, and as what."""

    name: str
    dtype: str
    """safetensors' name of it."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """Of its first byte in the file."""

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for dimension in self.shape:
            size *= dimension
        return size

    @property
    def num_bytes(self) -> int:
        return self.size * ITEM_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, from its header.

    Raises:
        RequestError: it is no safetensors file, or not a whole one.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER, file_bytes - 8):
                raise _not_safetensors(path, "it has no header")
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise _not_safetensors(path, str(error)) from None
    if not isinstance(header, dict):
        raise _not_safetensors(path, "its header is no JSON object")
    begin = 8 + length
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name] = _entry(path, name, entry, begin, file_bytes)
    return tensors


def _entry(path: Path, name: str, entry: Any, begin: int, file_bytes: int) -> StoredTensor:
    """One tensor of a header, whose data begin at `begin`.

    Raises:
        RequestError: it is not what a header may say, or not in the file.
    """
    try:
        dtype, (first, last), shape = entry["dtype"], entry["data_offsets"], tuple(entry["shape"])
    except (KeyError, TypeError, ValueError):
        raise _not_safetensors(path, f"its header is damaged at `{name}`") from None
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _not_safetensors(path, f"`{name}` is of dtype {dtype}, which ftcli does not know")
    if not all(isinstance(number, int) and number >= 0 for number in (first, last, *shape)):
        raise _not_safetensors(path, f"its header is damaged at `{name}`")
    tensor = StoredTensor(name, dtype, shape, path, begin + first)
    if tensor.num_bytes != last - first or begin + last > file_bytes:
        raise _not_safetensors(path, f"it ends before `{name}` does, or is damaged")
    return tensor


def _not_safetensors(path: Path, why: str) -> RequestError:
    return RequestError("weights cannot be read", [Problem("", f"`{path}`: {why}", "fetch or write the file again")])


def folder_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder, sharded or not, in the order of its files.

    Raises:
        RequestError: there are no safetensors weights, or a shard is missing.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            what = f"`{index}` has no `weight_map` from tensors to files"
            raise RequestError("a model is not whole", [Problem("", what, "fetch or write the file again")])
        paths = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        paths = [folder / SINGLE_FILE] if (folder / SINGLE_FILE).is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        pickled = [path.name for path in folder.glob("*.bin")]
        hint = f"`{pickled[0]}` is a pickle, which can run code: save the model as safetensors" if pickled else None
        raise RequestError("a model has no weights", [Problem("", f"`{folder}` has no *.safetensors", hint)])
    if missing := [path.name for path in paths if not path.is_file()]:
        raise RequestError(
            "a model is not whole", [Problem("", f"`{folder}`: its index names {', '.join(missing[:5])}, which is not there")]
        )
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        tensors |= read_header(path)
    return tensors


class OpenFiles:
    """Files that are read at many places by many threads; each is opened once."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def stored(self, tensor: StoredTensor, start: int, count: int) -> NDArray[Any]:
        """``(count,)`` elements from `start` on, of the element type they are stored as; bytes of dtypes without one."""
        element = STORED.get(tensor.dtype, np.dtype(f"V{ITEM_BYTES[tensor.dtype]}"))
        found = np.empty(count, element)
        target = memoryview(found.view(np.uint8).data).cast("B") if count else memoryview(b"")
        position, done = tensor.offset + start * element.itemsize, 0
        while done < len(target):
            num_read = os.preadv(self._descriptor(tensor.path), [target[done:]], position + done)
            if num_read == 0:
                raise _not_safetensors(tensor.path, "it has become shorter while it was read")
            done += num_read
        return found

    def numbers(self, tensor: StoredTensor, start: int, count: int) -> Array:
        """``(count,)`` numbers from `start` on."""
        return to_float32(self.stored(tensor, start, count), tensor.dtype)

    def whole(self, tensor: StoredTensor) -> Array:
        """The tensor in its own shape."""
        return self.numbers(tensor, 0, tensor.size).reshape(tensor.shape)

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]


def not_finite(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinite numbers; reads all of them, a chunk at a time."""
    found = []
    with OpenFiles() as files:
        for name, tensor in tensors.items():
            step = _SCANNED // ITEM_BYTES[tensor.dtype]
            starts = range(0, tensor.size, step)
            if not all(are_finite(files.stored(tensor, start, min(step, tensor.size - start)), tensor.dtype) for start in starts):
                found.append(name)
    return found


def file_chunks(num_bytes: int, chunk: int = 2**23) -> Iterator[tuple[int, int]]:
    """Position and length of each chunk of so many bytes."""
    for position in range(0, num_bytes, chunk):
        yield position, min(chunk, num_bytes - position)
