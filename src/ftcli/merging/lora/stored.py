"""Stored tensors as a mapping from names to float32 arrays; a look-up reads one, nothing is loaded before it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftcli.errors import Problem, RequestError
from ftcli.merging.documents import read_object
from ftcli.merging.numbers import STORED, Array
from ftcli.merging.stored import OpenFiles, StoredTensor, folder_tensors, read_header


class StoredTensors(Mapping[str, Array]):
    """Tensors by name."""

    def __init__(self, entries: Mapping[str, StoredTensor], config: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            config: of the model whose weights they are.
        """
        self.entries, self.config = dict(entries), config or {}

    def __getitem__(self, name: str) -> Array:
        entry = self.entries[name]
        if entry.dtype not in STORED:
            what = f"`{name}` is stored as {entry.dtype}, which cannot be computed with"
            raise RequestError("the weights cannot be read", [Problem(str(entry.path), what, f"allowed: {', '.join(STORED)}")])
        with OpenFiles() as files:
            return files.whole(entry)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return self.entries[name].shape

    @property
    def paths(self) -> list[Path]:
        """The files they are in."""
        return sorted({entry.path for entry in self.entries.values()})


def stored_file(path: Path) -> StoredTensors:
    """The tensors of one safetensors file.

    Raises:
        RequestError: it cannot be read.
    """
    return StoredTensors(read_header(path))


def stored_model(folder: Path) -> StoredTensors:
    """The weights of a model folder.

    Raises:
        RequestError: they cannot be read.
    """
    path = folder / "config.json"
    return StoredTensors(folder_tensors(folder), read_object(path) if path.is_file() else None)


def name_in_checkpoint(stored: Mapping[str, Any], name: str) -> str | None:
    """How a checkpoint calls the parameter `name`; some leave out or add the name of the decoder. None if it has none.

    Example:
        >>> name_in_checkpoint({"h.0.weight": 1}, "transformer.h.0.weight")
        'h.0.weight'
    """
    candidates = [name, name.partition(".")[2], *(f"{first}.{name}" for first in ("model", "transformer"))]
    return next((candidate for candidate in candidates if candidate in stored), None)
