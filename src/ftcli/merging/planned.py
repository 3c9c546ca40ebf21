"""A merge that can be done: every tensor, how it comes to be, and where it is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftcli.merging.inputs import fingerprint_of_files, fingerprint_of_tensors, input_files
from ftcli.merging.numbers import ITEM_BYTES
from ftcli.merging.pieces import rows_and_columns
from ftcli.merging.recipe import MergeRecipe
from ftcli.merging.sources import Source
from ftcli.merging.stored import StoredTensor
from ftcli.merging.vocabulary import Vocabulary

SHARD_BYTES = 5 * 10**9
FORMAT = 5


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor of one of the models."""

    source: int
    name: str


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor of the merged model comes to be, and where it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    inputs: tuple[Input, ...]
    base: Input | None
    settings: Mapping[str, Any]
    labels: tuple[str, ...]
    """A name for each input, for its random bits."""
    is_copy: bool
    """The only input is copied, bit for bit where the dtype stays."""
    is_vocabulary: bool
    """Its rows are tokens, which are put in the order of the merged vocabulary."""
    statistics: tuple[StoredTensor | None, ...] = ()
    shard: int = 0
    offset: int = 0
    """Of its first byte in the shard's file."""

    @property
    def size(self) -> int:
        rows, columns = rows_and_columns(self.shape)
        return rows * columns

    @property
    def num_bytes(self) -> int:
        return self.size * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """A file to be written: its header, and how long it will be."""

    name: str
    header: bytes
    num_bytes: int


@dataclass(frozen=True)
class Plan:
    """A merge that can be done."""

    recipe: MergeRecipe
    sources: tuple[Source, ...]
    donor: int
    """The source whose configuration and tokenizer the merged model starts from."""
    tensors: tuple[TensorPlan, ...]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    vocabulary: Vocabulary | None
    warnings: tuple[str, ...]
    read_bytes: int
    memory_bytes: int

    @property
    def write_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    def fingerprint(self) -> str:
        """Changes with whatever could change a byte of the result: a merge goes on only under the same one."""
        digest = hashlib.sha256(self.recipe.text.encode())
        digest.update(fingerprint_of_files(input_files(self.recipe, self.sources)).encode())
        digest.update(fingerprint_of_tensors(self.tensors).encode())
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        digest.update(f"{FORMAT}".encode())
        return digest.hexdigest()


def lay_out(tensors: Sequence[TensorPlan], shard_bytes: int) -> tuple[tuple[TensorPlan, ...], tuple[Shard, ...]]:
    """Tensors with their places in files of at most `shard_bytes` (a larger tensor has one for itself), in their order."""
    groups: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.num_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.num_bytes
    placed, shards = [], []
    for number, group in enumerate(groups):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        # wide elements first, so that every tensor begins at a multiple of its element
        ordered = sorted(group, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor in ordered:
            entries[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.num_bytes],
            }
            position += tensor.num_bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        for tensor in ordered:
            begin = len(header) + entries[tensor.name]["data_offsets"][0]
            placed.append(replace(tensor, shard=number, offset=begin))
        shards.append(Shard(name, header, len(header) + position))
    return tuple(placed), tuple(shards)
