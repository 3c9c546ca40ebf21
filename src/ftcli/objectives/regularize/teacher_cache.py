"""A teacher's answers to the targets of the training data on disk: the likeliest tokens of each, and what is left for the rest.

teacher-KEY/ beside the tokenised data of a source, complete or not there:
    answers.npy    (targets,) the k likeliest token ids and their log-probabilities, and the log-probability of all others together
    trees.npy      (2, trees + 1) which trees these are, and the first answer of each
Legend: ``M`` targets, ``k`` likeliest tokens, ``C`` targets of a chunk, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftcli.errors import RunError
from ftcli.files import new_folder
from ftcli.layout.build import build_posed
from ftcli.layout.model import inner_model
from ftcli.layout.plan import plan_micro_batches
from ftcli.models.head import chunk_size

if TYPE_CHECKING:
    from ftcli.data.store import TreeStore
    from ftcli.layout.batch import Batch
    from ftcli.layout.model import TreeModel
    from ftcli.objectives.objective import ObjectiveSettings, Posed
    from ftcli.objectives.regularize.teacher import Teacher

# Trees that are read and laid out together: enough to find some of like length, few enough to hold.
TREES_AT_ONCE = 512
# A tail as small as this adds nothing, and a logarithm of zero would.
SMALLEST_LOG_PROB = -60.0


class TeacherCache:
    """Answers of one teacher, by source."""

    def __init__(self, folders: Mapping[int, Path]) -> None:
        self._answers = {source: np.load(folder / "answers.npy", mmap_mode="r", allow_pickle=False) for source, folder in folders.items()}
        self._trees = {source: np.load(folder / "trees.npy", allow_pickle=False) for source, folder in folders.items()}

    def answer(self, model: TreeModel, batch: Batch, temperature: float) -> CachedAnswer:
        """The answers to the targets of `batch`; those of other sources are empty and must not be asked for."""
        assert batch.origin is not None
        counts = torch.bincount(batch.example, minlength=len(batch.origin.trees)).tolist()
        some = next(iter(self._answers.values()))
        found = np.zeros(len(batch.targets), dtype=some.dtype)
        done = 0
        for (source, tree), count in zip(batch.origin.trees, counts, strict=True):
            if source in self._answers:
                found[done : done + count] = self._of_tree(source, tree, count)
            done += count
        device = batch.targets.device
        return CachedAnswer(*(torch.from_numpy(np.ascontiguousarray(found[key])).to(device) for key in ("token", "log_prob", "rest")))

    def _of_tree(self, source: int, tree: int, count: int) -> NDArray[Any]:
        trees, firsts = self._trees[source]
        place = int(np.searchsorted(trees[:-1], tree))
        if place == len(trees) - 1 or trees[place] != tree or firsts[place + 1] - firsts[place] != count:
            raise RunError(f"the teacher's answers on disk are not those of tree {tree}", hint="`ftcli cache clear` removes them")
        answers: NDArray[Any] = self._answers[source]
        return answers[firsts[place] : firsts[place + 1]]


class CachedAnswer:
    """What is known of the answers to the targets of one batch.

    Args:
        tokens: ``(M, k)`` int32.
        log_probs: ``(M, k)`` float32, of these tokens.
        rest: ``(M,)`` float32 log-probability of all others together.
    """

    def __init__(self, tokens: Tensor, log_probs: Tensor, rest: Tensor) -> None:
        self.tokens, self.known, self.rest = tokens, log_probs, rest

    def log_probs(self, rows: Tensor, ours: Tensor) -> Tensor:
        """(C, V): the known tokens as they are, the rest in the proportions of `ours`."""
        tokens = self.tokens[rows].long()
        our_rest = ours.scatter(1, tokens, -torch.inf).logsumexp(-1)
        spread = ours + (self.rest[rows] - our_rest.clamp_min(SMALLEST_LOG_PROB))[:, None]
        return spread.scatter_(1, tokens, self.known[rows].to(spread.dtype))


def entry_type(top_k: int) -> np.dtype[Any]:
    """What is kept of one target."""
    return np.dtype([("token", "<i4", (top_k,)), ("log_prob", "<f4", (top_k,)), ("rest", "<f4")])


def write_answers(
    folder: Path,
    teacher: Teacher,
    model: TreeModel,
    store: TreeStore,
    trees: NDArray[np.int64],
    objective: ObjectiveSettings,
    *,
    top_k: int,
    temperature: float,
    micro_batch_tokens: int,
    pad_id: int,
    tell: Callable[[int], None],
) -> None:
    """Compute the answers to the targets of some trees and keep them in `folder`.

    Args:
        trees: which, ascending.
        top_k: less than the vocabulary.

    Raises:
        RunError: the disk is full.
    """
    counts = [int(np.count_nonzero(objective.pose(store.tree(int(tree))).target_weights)) for tree in trees]
    firsts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    with new_folder(folder) as partial:
        np.save(partial / "trees.npy", np.stack([np.append(trees, -1), firsts]), allow_pickle=False)
        kept = np.lib.format.open_memmap(partial / "answers.npy", mode="w+", dtype=entry_type(top_k), shape=(int(firsts[-1]),))
        for start in range(0, len(trees), TREES_AT_ONCE):
            chosen = trees[start : start + TREES_AT_ONCE]
            posed = [objective.pose(store.tree(int(tree))) for tree in chosen]
            for part in plan_micro_batches([len(item.tree) for item in posed], 1, micro_batch_tokens)[0]:
                found = _answers(teacher, model, [posed[i] for i in part], top_k, temperature, pad_id)
                done = 0
                for i in part:
                    place = firsts[start + i : start + i + 2]
                    kept[place[0] : place[1]] = found[done : done + counts[start + i]]
                    done += counts[start + i]
            tell(start + len(chosen))
        kept.flush()


def _answers(teacher: Teacher, model: TreeModel, posed: Sequence[Posed], top_k: int, temperature: float, pad_id: int) -> NDArray[Any]:
    """The entries of all targets of a few examples."""
    device = next(model.parameters()).device
    batch = build_posed(model.layout, posed, pad_id).to(device)
    states = teacher.hidden_states(model, batch)[batch.predict_from]
    head = inner_model(model.module).get_output_embeddings()
    entries = np.zeros(len(batch.targets), dtype=entry_type(top_k))
    size = chunk_size(int(getattr(head, "out_features", 0)) or 2**15, states)
    for start in range(0, len(states), size):
        part = slice(start, start + size)
        log_probs = (teacher.logits(model, states[part]) / temperature).log_softmax(-1)
        known, tokens = log_probs.topk(top_k, dim=-1)
        rest = log_probs.scatter(1, tokens, -torch.inf).logsumexp(-1).clamp_min(SMALLEST_LOG_PROB)
        entries["token"][part] = tokens.cpu().numpy()
        entries["log_prob"][part] = known.cpu().numpy()
        entries["rest"][part] = rest.cpu().numpy()
    return entries
