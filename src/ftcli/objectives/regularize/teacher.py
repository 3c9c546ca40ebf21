"""The model that answers: the one that trains with its adapter off or with its first weights, or another one.

A teacher lends, for a while, a `TreeModel` that computes its answers: the trained model itself, changed and put back, or its own.
It computes without dropout, without a graph, and draws no random numbers.
Legend: ``T`` token slots, ``D`` hidden size, ``C`` targets of a chunk, ``V`` vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from ftcli.layout.model import inner_model

if TYPE_CHECKING:
    from ftcli.layout.batch import Batch
    from ftcli.layout.model import TreeModel
    from ftcli.objectives.regularize.start import Start


class Answer(Protocol):
    """The teacher's answers to the targets of one batch."""

    def log_probs(self, rows: Tensor, ours: Tensor) -> Tensor:
        """(C, V) of some targets of the batch, at the temperature of training.

        Args:
            rows: ``(C,)`` which targets.
            ours: ``(C, V)`` log-probabilities of the model that trains.
        """
        ...


class Teacher(ABC):
    """A model that answers."""

    @abstractmethod
    def lent(self, model: TreeModel) -> AbstractContextManager[TreeModel]:
        """What computes the teacher's answers, until the end of the block.

        Args:
            model: the one that trains.
        """

    def hidden_states(self, model: TreeModel, batch: Batch) -> Tensor:
        """(T, D) the teacher's last hidden states."""
        with torch.no_grad(), self.lent(model) as own:
            return own.hidden_states(batch)

    def logits(self, model: TreeModel, states: Tensor) -> Tensor:
        """(C, V) float32 of (C, D) states."""
        with torch.no_grad(), self.lent(model) as own:
            return own.transform(inner_model(own.module).get_output_embeddings()(states))

    def answer(self, model: TreeModel, batch: Batch, temperature: float) -> Answer:
        """Its answers to the targets of `batch`."""
        return FullAnswer(self, model, batch, temperature)


class FullAnswer:
    """The whole distribution, a few targets at a time."""

    def __init__(self, teacher: Teacher, model: TreeModel, batch: Batch, temperature: float) -> None:
        self.teacher, self.model, self.temperature = teacher, model, temperature
        self.states = teacher.hidden_states(model, batch)
        self.predict_from = batch.predict_from

    def log_probs(self, rows: Tensor, ours: Tensor) -> Tensor:
        """(C, V); the model's own are not needed."""
        return (self.teacher.logits(self.model, self.states[self.predict_from[rows]]) / self.temperature).log_softmax(-1)


class AdapterOff(Teacher):
    """The trained model without what the method put on it: the base, of which no second copy is needed.

    PEFT's own context manager would mark the adapter's weights as frozen and then all as trained, whatever they were.
    """

    def __init__(self, in_place: Start | None = None) -> None:
        """
        Args:
            in_place: what trains within the base itself, as it is in the base; None where nothing does.
        """
        self.in_place = in_place

    def lent(self, model: TreeModel) -> AbstractContextManager[TreeModel]:
        """The trained model, its adapter off and the base's own weights in place."""
        return self._without_adapter(model)

    @contextmanager
    def _without_adapter(self, model: TreeModel) -> Iterator[TreeModel]:
        flags = [
            (child, name)
            for child in model.module.modules()
            for name in ("_disable_adapters", "_adapters_disabled")
            if name in child.__dict__ or hasattr(type(child), name)
        ]
        own = [getattr(child, name) for child, name in flags]
        with without_dropout(model.module), nullcontext() if self.in_place is None else self.in_place.restored():
            try:
                for child, name in flags:
                    setattr(child, name, True)
                yield model
            finally:
                for (child, name), value in zip(flags, own, strict=True):
                    setattr(child, name, value)


class AtStart(Teacher):
    """The trained model with the weights that it started with."""

    def __init__(self, start: Start) -> None:
        self.start = start

    def lent(self, model: TreeModel) -> AbstractContextManager[TreeModel]:
        """The trained model, its first weights in place."""
        return self._with_first_weights(model)

    @contextmanager
    def _with_first_weights(self, model: TreeModel) -> Iterator[TreeModel]:
        with without_dropout(model.module), self.start.restored():
            yield model


class OtherModel(Teacher):
    """Another model of the same vocabulary, frozen."""

    def __init__(self, other: TreeModel) -> None:
        self.other = other.eval()
        self.other.requires_grad_(False)

    def lent(self, model: TreeModel) -> AbstractContextManager[TreeModel]:
        """The other model."""
        return self._own()

    @contextmanager
    def _own(self) -> Iterator[TreeModel]:
        yield self.other


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """All modules are in evaluation mode until the end of the block."""
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True
