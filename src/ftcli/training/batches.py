"""The batches of a step: a pure function of the order, the step and this process's index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ftcli.layout.batch import Origin
from ftcli.layout.build import build_posed
from ftcli.layout.plan import plan_micro_batches

if TYPE_CHECKING:
    from ftcli.data.order import Order
    from ftcli.data.store import TreeStore
    from ftcli.layout.batch import Batch
    from ftcli.objectives import Objective
    from ftcli.objectives.objective import Posed


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
    source_tokens: list[int]
    """Tokens of each source in the whole step."""
    digest: str
    """SHA-256 over the tokens, weights and labels of the whole step."""


def digest_of(posed: Sequence[Posed]) -> str:
    """SHA-256 over the tokens, weights and labels of a step's examples."""
    digest = hashlib.sha256()
    for item in posed:
        digest.update(np.int64(len(item.tree)).tobytes() + item.tree.tokens.tobytes() + item.target_weights.tobytes())
        digest.update(b"" if item.labels is None else item.labels.tobytes() + np.float64(item.weight).tobytes())
    return digest.hexdigest()


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
        posed = [self.objective.pose(tree) for tree in trees]
        plan = plan_micro_batches([len(item.tree) for item in posed], self.num_processes, self.micro_batch_tokens)
        mine = plan[self.process_index]
        return StepBatches(
            step=step,
            micro_batches=[
                replace(
                    build_posed(self.layout, [posed[i] for i in part], self.pad_id),
                    origin=Origin(step, tuple(examples[i] for i in part)),
                )
                for part in mine
            ],
            sources=[[examples[i][0] for i in part] for part in mine],
            examples=examples,
            normaliser=sum(item.weight for item in posed),
            num_tokens=sum(len(item.tree) for item in posed),
            num_targets=sum(item.num_targets for item in posed),
            source_tokens=[
                sum(len(item.tree) for item, (of, _) in zip(posed, examples, strict=True) if of == source)
                for source in range(len(self.stores))
            ],
            digest=digest_of(posed),
        )

    def between(self, first: int, last: int) -> Iterator[StepBatches]:
        """The batches of steps `first` to `last`; the next step's are built while this one's are computed."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
            upcoming: Future[StepBatches] | None = None
            for step in range(first, last + 1):
                current = self.at(step) if upcoming is None else upcoming.result()
                upcoming = pool.submit(self.at, step + 1) if step < last else None
                yield current
