"""What frozen lower layers compute, kept on disk for every example that is seen again, so that these layers are skipped for it.

frozen_cache/ in the run folder, gone when the run is finished:
    hidden.bin    (tokens, D) hidden states at the boundary, token after token, tree after tree; its size is taken at the start
    index.bin     for every tree the step that computed it (0: none yet) and a checksum
    meta.json     what all this depends on: frozen weights, data, boundary, layout, versions

A tree's states may differ in their last bits with the batch they are computed in. So that a resumed run reads what the
uninterrupted one read, it forgets what was computed after its checkpoint, and computes it in the same batches again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ftcli.errors import Problem, RequestError
from ftcli.files import said_when_disk_is_full, write_json
from ftcli.layout.boundary import Boundary, only_trees, tree_slots
from ftcli.layout.build import build_batch
from ftcli.layout.model import TreeModel, inner_model
from ftcli.training.resources import free_disk_bytes
from ftcli.units import format_bytes

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ftcli.data.store import TreeStore
    from ftcli.data.tree import TokenTree
    from ftcli.layout.batch import Batch
    from ftcli.recipe.recipe import Recipe
    from ftcli.training.assemble import DataParts, ModelParts

FOLDER = "frozen_cache"
WHERE = "method.cache_frozen"
ENTRY = np.dtype([("step", "<i4"), ("checksum", "<u4")])


class FrozenCache:
    """Hidden states at a boundary by (source, tree), and the forward pass that uses them: `TreeModel.lower_layers`.

    Args:
        folder: of this cache alone.
        boundary: on the model's layers.
        model: what computes what is missing.
        lengths: tokens of each tree, by source; None for sources that are not kept because nothing of them is seen twice.
        like: any (..., D) hidden states, for size and dtype.
        content: what the states depend on; a cache of other content is begun anew.
    """

    def __init__(
        self,
        folder: Path,
        boundary: Boundary,
        model: TreeModel,
        lengths: Sequence[Any | None],
        like: Tensor,
        content: dict[str, Any],
    ) -> None:
        self.folder, self.boundary, self.model = folder, boundary, model
        self.tokens_computed = self.tokens_read = 0
        kept = [np.zeros(0, dtype=np.int64) if own is None else np.asarray(own, dtype=np.int64) for own in lengths]
        self._is_kept = [own is not None for own in lengths]
        self._first_tree = np.cumsum([0, *(len(own) for own in kept)])
        self._first_token = np.cumsum([0, *np.concatenate(kept).tolist()])
        self.num_bytes = size_of(lengths, like)
        self._begun = False
        self._open({**content, "dtype": str(like.dtype), "width": like.shape[-1]}, like)

    def _open(self, content: dict[str, Any], like: Tensor) -> None:
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        meta, hidden, index = self.folder / "meta.json", self.folder / "hidden.bin", self.folder / "index.bin"
        self.was_there = meta.is_file() and json.loads(meta.read_text())["key"] == key
        if not self.was_there:
            shutil.rmtree(self.folder, ignore_errors=True)
            with said_when_disk_is_full(hidden):
                self.folder.mkdir(parents=True)
                _allocate(hidden, self.num_bytes)
                _allocate(index, int(self._first_tree[-1]) * ENTRY.itemsize)
            write_json(meta, {"key": key, **content})
        rows = int(self._first_token[-1])
        self._hidden = torch.from_file(str(hidden), shared=True, size=rows * like.shape[-1], dtype=like.dtype).view(rows, -1)
        self._index = np.memmap(index, dtype=ENTRY, mode="r+").view(np.ndarray)

    @contextmanager
    def __call__(self, batch: Batch) -> Iterator[None]:
        """A forward pass over `batch` in which the lower layers compute nothing; what is not kept yet is computed before it."""
        if batch.origin is None:
            yield
            return
        if not self._begun:
            self._index["step"][self._index["step"] >= batch.origin.step] = 0
            self._begun = True
        with self.boundary.upper(self._at_boundary(batch)):
            yield

    def _at_boundary(self, batch: Batch) -> Tensor:
        """(B, L, D) on the batch's device; zeros where there is padding."""
        assert batch.origin is not None
        slots = tree_slots(batch)
        states = {i: self._read(source, tree) for i, (source, tree) in enumerate(batch.origin.trees)}
        missing = [i for i, found in states.items() if found is None]
        for i, computed in zip(missing, self._compute(batch, missing), strict=True):
            states[i] = computed
            self._write(*batch.origin.trees[i], computed, batch.origin.step)
            self.tokens_computed += len(computed)
        self.tokens_read += sum(len(found) for i, found in states.items() if found is not None and i not in missing)
        shape = (*batch.input_ids.shape, self._hidden.shape[1])
        whole = torch.zeros(shape, dtype=self._hidden.dtype, device=batch.input_ids.device)
        flat = whole.view(-1, shape[-1])
        for i, found in states.items():
            assert found is not None
            flat[slots[i]] = found.to(flat.device)
        return whole

    def _compute(self, batch: Batch, trees: Sequence[int]) -> list[Tensor]:
        """(n, D) states of each of `trees`, all in one pass through the lower layers."""
        if not trees:
            return []
        part = only_trees(batch, trees)
        hidden = lower_states(self.model, self.boundary, part)
        return [hidden[slots] for slots in tree_slots(part)]

    def _read(self, source: int, tree: int) -> Tensor | None:
        """(n, D) on the CPU, or None if it is not there, or damaged."""
        if not self._is_kept[source]:
            return None
        number = self._first_tree[source] + tree
        entry, states = self._index[number], self._states(number)
        return states if entry["step"] > 0 and _checksum(states) == entry["checksum"] else None

    def _write(self, source: int, tree: int, states: Tensor, step: int) -> None:
        if self._is_kept[source]:
            number = self._first_tree[source] + tree
            self._states(number).copy_(states)
            self._index[number] = (step, _checksum(self._states(number)))

    def _states(self, number: int) -> Tensor:
        return self._hidden[self._first_token[number] : self._first_token[number + 1]]

    def line(self) -> str:
        """Its use in one line."""
        share = self.tokens_read / max(1, self.tokens_read + self.tokens_computed)
        return f"{share:.0%} of the tokens skipped the lowest {self.boundary.num_lower} layers"

    def to_json(self) -> dict[str, Any]:
        """Size and use, for the manifest."""
        counts = {"tokens_computed": self.tokens_computed, "tokens_read": self.tokens_read}
        return {"layers": self.boundary.num_lower, "bytes": self.num_bytes, **counts}

    def remove(self) -> None:
        """Give the model its own forward pass back, and the disk its room."""
        self.model.lower_layers = None
        self.boundary.remove()
        shutil.rmtree(self.folder, ignore_errors=True)


def _checksum(states: Tensor) -> int:
    return zlib.crc32(states.contiguous().view(torch.uint8).numpy().data)


def _allocate(path: Path, num_bytes: int) -> None:
    """A file of zeros whose room is taken: writing through a map to a full disk would kill the process."""
    with path.open("wb") as file:
        file.truncate(num_bytes)
        if num_bytes and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)


def require_room(folder: Path, num_bytes: int) -> None:
    """Refuse a cache that cannot fit.

    Raises:
        RequestError: less is free than it will need.
    """
    free = free_disk_bytes(folder)
    if num_bytes > free:
        what = f"the hidden states need {format_bytes(num_bytes)} of disk and {format_bytes(free)} are free at {folder.parent}"
        raise RequestError("no room for the cache", [Problem(WHERE, what, "leave it out, or give another `output`")])


def lower_states(model: TreeModel, boundary: Boundary, batch: Batch) -> Tensor:
    """(T, D) what the lower layers compute for `batch`."""
    with boundary.lower():
        model.hidden_states(batch)
        return boundary.hidden.flatten(0, 1)


@dataclass(frozen=True, eq=False)
class CachePlan:
    """A cache that has been proven to hold, and is not on the disk yet."""

    folder: Path
    boundary: Boundary
    model: TreeModel
    lengths: list[Any | None]
    like: Tensor
    content: dict[str, Any]

    def open(self, frozen: str) -> FrozenCache:
        """The cache, in use.

        Args:
            frozen: hash of the frozen weights.

        Raises:
            RunError: the disk is full.
        """
        content = {**self.content, "frozen": frozen}
        self.model.lower_layers = cache = FrozenCache(self.folder, self.boundary, self.model, self.lengths, self.like, content)
        return cache


def plan_frozen_cache(
    recipe: Recipe, data: DataParts, parts: ModelParts, accelerator: Accelerator, folder: Path, say: Callable[[str], None]
) -> CachePlan | None:
    """The cache that the method asks for; None where it asks for none, or no example of the run is seen twice.

    Args:
        folder: of the run.
        say: told in one line what is kept, or why nothing is.

    Raises:
        RequestError: the cache cannot hold here, and why.
    """
    num_lower = recipe.method.frozen_layers(parts.module)
    stores, repeats = data.prepared.train, data.order.repeats()
    if num_lower == 0:
        return None
    if max(repeats) <= 1:
        say("nothing is kept by cache_frozen: no example of this run is seen twice")
        return None
    refuse(recipe, accelerator, stores, parts.layout.layout)
    from ftcli.methods.parts import decoder_layers

    boundary = Boundary(decoder_layers(inner_model(parts.module))[1], num_lower)
    lengths = [store.lengths if passes > 1 else None for store, passes in zip(stores, repeats, strict=True)]
    try:
        with accelerator.autocast():
            like = proven_states(parts.model, boundary, data.probe_trees())
        num_bytes = size_of(lengths, like)
        if not (folder / FOLDER).is_dir():
            require_room(folder / FOLDER, num_bytes)
    except RequestError:
        boundary.remove()
        raise
    say(f"keeps what the lowest {num_lower} layers compute: {format_bytes(num_bytes)} in {FOLDER}/ until the run is finished")
    content = {
        "data": [store.report.cache_key for store in stores],
        "kept": [own is not None for own in lengths],
        "num_lower": num_lower,
        "layout": parts.layout.layout,
        "micro_batch_tokens": recipe.train.micro_batch_tokens,
        "device": accelerator.device.type,
        "torch": torch.__version__,
    }
    return CachePlan(folder / FOLDER, boundary, parts.model, lengths, like, content)


def size_of(lengths: Sequence[Any | None], like: Tensor) -> int:
    """Bytes of the hidden states of all trees that are kept."""
    return sum(int(own.sum()) for own in lengths if own is not None) * like.shape[-1] * like.element_size()


def refuse(recipe: Recipe, accelerator: Accelerator, stores: Sequence[TreeStore], layout: str) -> None:
    """What is known beforehand not to work.

    Raises:
        RequestError: and why.
    """
    problems = []
    if recipe.train.compile:
        problems.append(Problem(WHERE, "a compiled model has no layers that could be skipped", "train.compile: false"))
    if accelerator.num_processes > 1:
        problems.append(Problem(WHERE, f"{accelerator.num_processes} processes: an example does not stay with one of them", "one process"))
    first_trees = [store.tree(0) for store in stores]
    if layout == "rows" and any(len(tree.starts) > 1 for tree in first_trees):
        problems.append(Problem(WHERE, "examples with branches in the rows layout", "a model that the forest fits"))
    if any(len(recipe.objective.pose(tree).tree) != len(tree) for tree in first_trees):
        problems.append(Problem(WHERE, f"objective `{recipe.objective.kind}` does not see the examples as they are kept", "causal-lm"))
    if problems:
        raise RequestError("the cache cannot be used", problems)


def proven_states(model: TreeModel, boundary: Boundary, trees: Sequence[TokenTree]) -> Tensor:
    """(T, D) states at the boundary of some trees, after proof that nothing else of the lower layers reaches the upper ones.

    Raises:
        RequestError: it does, or the lower layers compute something else each time.
    """
    weights = [(np.arange(len(tree)) > 0).astype(np.float32) for tree in trees]
    batch = build_batch(model.layout, trees, weights).to(next(model.parameters()).device)
    was_training = model.training
    try:
        model.eval()
        with torch.no_grad():
            whole = model.hidden_states(batch)
            states = lower_states(model, boundary, batch)
            # What the layers may keep beside their output is of other tokens by then.
            lower_states(model, boundary, replace(batch, input_ids=batch.input_ids.flip(1)))
            with boundary.upper(states.view(*batch.input_ids.shape, -1)):
                parted = model.hidden_states(batch)
            model.train()
            first, second = (lower_states(model, boundary, batch) for _ in range(2))
    finally:
        model.train(was_training)
    problems = []
    if not torch.equal(whole, parted):
        problems.append(Problem(WHERE, "the upper layers of this model see more of the lower ones than their last hidden states"))
    if not torch.equal(first, second):
        problems.append(Problem(WHERE, "the frozen layers compute something else each time: they have dropout", "leave cache_frozen out"))
    if problems:
        raise RequestError("the cache cannot be used", problems)
    return states
