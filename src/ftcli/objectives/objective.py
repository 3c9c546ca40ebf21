"""What every objective is: its settings, how an example is put to the model, and what the answer costs.

An objective sees each example twice. `pose` says what the model gets of it and what is asked: which tokens are targets, or which
label is right. `losses` says what the model's outputs cost. Between the two, batches, micro-batches and devices cut as they
like: the step divides the summed losses once by the summed weights that `pose` gave.
Legend: ``n`` tokens of a tree, ``M`` targets, ``R`` branches, ``E`` examples of a batch, ``C`` classes, ``I`` losses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from pydantic import model_validator

from ftcli.objectives.regularize import Regularizer
from ftcli.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ftcli.data.store import TreeStore
    from ftcli.data.tree import TokenTree
    from ftcli.layout.batch import Batch
    from ftcli.models.classifier import ClassHead
    from ftcli.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Posed:
    """One example as an objective puts it to a model."""

    tree: TokenTree
    """What is laid out: the example's own tree, or one with branches for what is compared."""
    target_weights: NDArray[np.float32]
    """(n,) weight of each token as a target; where it is 0 no log-probability is computed."""
    weight: float
    """What the example adds to the divisor of a step's loss."""
    num_targets: int
    """What the example adds to the count of targets."""
    labels: NDArray[np.float32] | None = None
    """The right answer as numbers, where it is not made of targets."""


class Losses(NamedTuple):
    """What a batch costs, in parts that belong to one example each."""

    values: Tensor
    """(I,) nats, or squared units of a regression."""
    weights: Tensor
    """(I,) how much each counts."""
    example: Tensor
    """(I,) int64: which example of the batch each belongs to."""


class ObjectiveSettings(Spec, ABC):
    """What is minimised."""

    regularize: tuple[Regularizer, ...] = ()
    """What holds training near where it began: penalties beside the loss."""

    formats: ClassVar[frozenset[str]]
    """Kinds of the formats whose examples it can learn from."""
    regularizers: ClassVar[frozenset[str]] = frozenset({"l2_sp"})
    """Kinds of the regularizers that mean something beside it."""

    @model_validator(mode="after")
    def _regularizers_fit(self) -> Self:
        kinds: list[str] = [regularizer.kind for regularizer in self.regularize]
        if strangers := sorted(set(kinds) - self.regularizers):
            allowed = ", ".join(f"`{kind}`" for kind in sorted(self.regularizers))
            raise ValueError(f"found `{strangers[0]}` in `regularize`, allowed: {allowed}")
        if twice := [kind for kind in ("ewc", "l2_sp") if kinds.count(kind) > 1]:
            raise ValueError(f"found `{twice[0]}` {kinds.count(twice[0])} times in `regularize`, allowed: once")
        return self

    @property
    def head(self) -> ClassHead | None:
        """The classification head that it reads; None where it reads the language model's own."""
        return None

    def settled(self, train: Sequence[TreeStore], evaluation: Sequence[TreeStore], tokenizer: Tokenizer) -> Self:
        """The same with everything filled in that only the data tells.

        Raises:
            DataError: the data is not what the objective needs.
        """
        return self

    def settled_as(self, other: ObjectiveSettings) -> Self:
        """The same with what `other` was settled with, so that a recipe can be compared with the one that a run began with."""
        return self

    def on_few_rows(self) -> Self:
        """The same where the data is cut short, as in a smoke run."""
        return self

    @property
    def num_added_tokens(self) -> int:
        """Tokens that `pose` adds to every tree."""
        return 0

    @property
    def longest_addition(self) -> int:
        """Tokens that `pose` adds to the longest branch of a tree."""
        return 0

    @abstractmethod
    def pose(self, tree: TokenTree, *, is_measured: bool = False) -> Posed:
        """The example as it is trained on, or as it is measured: there only what is to be answered counts."""

    @abstractmethod
    def losses(self, outputs: Tensor, batch: Batch) -> Losses:
        """What the model's outputs cost.

        Args:
            outputs: ``(M,)`` log-probability of each target of the batch; with a classification head ``(R, C)`` logits.
        """

    def scores(self, outputs: Tensor, batch: Batch) -> Tensor | None:
        """(E, C) what the objective's own measures are made of; None where the losses say all."""
        return None

    def measures(self, scores: NDArray[np.float64], labels: NDArray[np.float64]) -> dict[str, Any]:
        """Further measures of a whole source, beside its loss.

        Args:
            scores: ``(N, C)`` of all its examples, as `scores` gave them.
            labels: ``(N, G)`` their right answers.
        """
        return {}
