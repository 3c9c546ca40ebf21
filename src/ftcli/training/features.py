"""Features of every example, computed once by the frozen base and kept on disk beside the tokenised data.

A file of features is named for all that its numbers depend on: weights, pooling, layout and numeric type; the trees it belongs
to are those of the store that it lies in. It is complete or not there, and `ftcli cache clear` removes both together.
Legend: ``N`` examples of a source, ``D`` hidden size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from ftcli.data.store import TreeStore
from ftcli.files import said_when_disk_is_full
from ftcli.layout.build import build_batch
from ftcli.layout.model import TreeModel, inner_model
from ftcli.layout.plan import plan_micro_batches
from ftcli.layout.readout import default_pooling, pooled
from ftcli.methods.feature_head import FeatureSet
from ftcli.training.proofs import hash_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ftcli.data.prepare import Progress
    from ftcli.data.tree import TokenTree
    from ftcli.objectives.classification import Classification
    from ftcli.objectives.objective import ObjectiveSettings

# Raise it when the same weights and trees give other features than before.
CODE_VERSION = 1
# Activations should stay near the caches of a CPU: 500 short texts took 1.7 s with 4096 tokens at once, and 1.4 s with 1024.
MICRO_BATCH_TOKENS_CPU = 1024
MICRO_BATCH_TOKENS_GPU = 16384
REPORTED_EXAMPLES = 256


class FeatureStore(TreeStore):
    """The trees of a store, each with its features."""

    def __init__(self, store: TreeStore, features: NDArray[np.float32]) -> None:
        super().__init__(store.folder, store.entry, store.name, cache_hit=store.report.cache_hit)
        self.features = features

    def tree(self, index: int) -> TokenTree:
        """One tree with its features."""
        return replace(super().tree(index), features=self.features[index])


def with_features(model: TreeModel, store: TreeStore, base_key: str, pad_id: int, progress: Progress | None) -> FeatureStore:
    """`store` with the features of all its examples, from disk or computed now.

    Args:
        model: in the layout to compute in.
        base_key: what `key_of_base` says of `model`.

    Raises:
        RunError: the disk is full.
    """
    path = store.folder / f"features-{base_key}.npy"
    if not _is_whole(path, len(store)):
        tell = (lambda done: None) if progress is None else _teller(progress, len(store), store.name)
        features = compute_features(model, store, pad_id, tell)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        with said_when_disk_is_full(path):
            with partial.open("wb") as file:
                np.save(file, features, allow_pickle=False)
            partial.replace(path)
    kept = np.load(path, mmap_mode="r", allow_pickle=False)
    return FeatureStore(store, kept.view(np.ndarray))


def _teller(progress: Progress, total: int, name: str) -> Callable[[int], None]:
    return lambda done: progress.update(done, total, f"features of {name}")


def _is_whole(path: Path, count: int) -> bool:
    try:
        return len(np.load(path, mmap_mode="r", allow_pickle=False)) == count
    except (FileNotFoundError, ValueError, EOFError):
        return False


def key_of_base(model: TreeModel) -> str:
    """All that features depend on but the trees: weights of the base, dtype, pooling, layout."""
    inner = inner_model(model.module)
    weights = hash_tensors(inner.base_model.named_parameters())
    content = [CODE_VERSION, weights, inner.dtype, default_pooling(inner), model.layout, torch.__version__]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:32]


@torch.inference_mode()
def compute_features(model: TreeModel, store: TreeStore, pad_id: int, tell: Callable[[int], None]) -> NDArray[np.float32]:
    """(N, D) float32: what a head would read of every tree."""
    inner = inner_model(model.module)
    device, pooling = next(inner.parameters()).device, default_pooling(inner)
    features = np.zeros((len(store), int(inner.config.get_text_config().hidden_size)), dtype=np.float32)
    was_training, done, told = model.training, 0, 0
    model.eval()
    try:
        budget = MICRO_BATCH_TOKENS_CPU if device.type == "cpu" else MICRO_BATCH_TOKENS_GPU
        for part in plan_micro_batches(store.lengths.tolist(), 1, budget)[0]:
            trees = [store.tree(index) for index in part]
            batch = build_batch(model.layout, trees, [np.zeros(len(tree), dtype=np.float32) for tree in trees], pad_id).to(device)
            features[part] = pooled(model.hidden_states(batch), batch, pooling).float().cpu().numpy()
            done += len(part)
            if done - told >= REPORTED_EXAMPLES:
                tell(done)
                told = done
    finally:
        model.train(was_training)
    return features


def training_set(stores: Sequence[FeatureStore], objective: ObjectiveSettings) -> FeatureSet:
    """All training data of a classifier."""
    posed = [objective.pose(store.tree(index)) for store in stores for index in range(len(store))]
    return FeatureSet(
        vectors=torch.from_numpy(np.concatenate([store.features for store in stores])),
        labels=torch.from_numpy(np.stack([item.labels for item in posed if item.labels is not None])),
        weights=torch.tensor([item.weight for item in posed], dtype=torch.float32),
        task=cast("Classification", objective).task,
    )
