"""The batches of a step: a pure function of the order, the step and this process's index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ftcli.layout.build import build_batch
from ftcli.layout.plan import plan_micro_batches

if TYPE_CHECKING:
    from ftcli.data.order import Order
    from ftcli.data.store import TreeStore
    from ftcli.layout.batch import Batch
    from ftcli.objectives import Objective


@dataclass(frozen=True, slots=True, eq=False)
class StepBatches:
    """What one process computes in one step, and what it must know of the whole step."""

    step: int
    micro_batches: list[Batch]
    """This process's share."""
    sources: list[list[int]]
    """For each of its micro-batches the source of each example."""
    examples: list[tuple[int, int]]
    """(source, tree) of every example of the step, on all processes."""
    normaliser: float
    """Sum of the target weights of the whole step: the loss is divided by it, once."""
    num_tokens: int
    num_targets: int
    digest: str
    """SHA-256 over the tokens and weights of the whole step."""


@dataclass(frozen=True, slots=True)
class BatchSource:
    """Builds the batches of any step."""

    stores: Sequence[TreeStore]
    order: Order
    objective: Objective
    layout: str
    micro_batch_tokens: int
    num_processes: int
    process_index: int
    pad_id: int

    def at(self, step: int) -> StepBatches:
        """The batches of `step`, counted from 1."""
        examples = self.order.examples_at(step)
        trees = [self.stores[source].tree(index) for source, index in examples]
        weights = [self.objective.target_weights(tree) for tree in trees]
        plan = plan_micro_batches([len(tree) for tree in trees], self.num_processes, self.micro_batch_tokens)
        digest = hashlib.sha256()
        for tree, weight in zip(trees, weights, strict=True):
            digest.update(np.int64(len(tree)).tobytes() + tree.tokens.tobytes() + weight.tobytes())
        mine = plan[self.process_index]
        return StepBatches(
            step=step,
            micro_batches=[build_batch(self.layout, [trees[i] for i in part], [weights[i] for i in part], self.pad_id) for part in mine],
            sources=[[examples[i][0] for i in part] for part in mine],
            examples=examples,
            normaliser=float(sum(np.sum(weight, dtype=np.float64) for weight in weights)),
            num_tokens=sum(len(tree) for tree in trees),
            num_targets=int(sum(np.count_nonzero(weight) for weight in weights)),
            digest=digest.hexdigest(),
        )

    def between(self, first: int, last: int) -> Iterator[StepBatches]:
        """The batches of steps `first` to `last`; the next step's are built while this one's are computed."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
            upcoming: Future[StepBatches] | None = None
            for step in range(first, last + 1):
                current = self.at(step) if upcoming is None else upcoming.result()
                upcoming = pool.submit(self.at, step + 1) if step < last else None
                yield current
