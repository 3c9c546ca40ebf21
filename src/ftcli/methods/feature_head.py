"""A small classifier over fixed vectors, and the ways to fit it at once.

Legend: ``N`` examples, ``D`` numbers of a feature vector, ``C`` classes, ``H`` hidden units.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftcli.errors import MissingExtraError

Task = Literal["single", "multi", "regression"]
MAX_ITERATIONS = 200


@dataclass(frozen=True, slots=True, eq=False)
class FeatureSet:
    """All that a classifier learns from."""

    vectors: Tensor
    """(N, D) float32."""
    labels: Tensor
    """(N, G) float32: the index of the label, a 1 for each label, or a number."""
    weights: Tensor
    """(N,) float32: how much each example counts."""
    task: Task


class FeatureHead(nn.Module):
    """Logits of standardised features, through a hidden layer or not."""

    def __init__(self, width: int, num_classes: int, num_hidden: int | None) -> None:
        super().__init__()
        self.num_hidden = num_hidden
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.hidden = None if num_hidden is None else nn.Linear(width, num_hidden)
        self.output = nn.Linear(width if num_hidden is None else num_hidden, num_classes)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.training_set: FeatureSet | None = None
        self.kept: list[Tensor] | None = None

    def forward(self, features: Tensor) -> Tensor:
        """(..., D) to (..., C)."""
        scaled = (features.to(self.mean.dtype) - self.mean) / self.deviation
        if self.hidden is not None:
            scaled = functional.relu(self.hidden(scaled))
        logits: Tensor = self.output(scaled)
        return logits

    def standardise(self, vectors: Tensor) -> None:
        """Take mean and deviation of each feature from (N, D) `vectors`; a feature that never varies stays as it is."""
        deviation, mean = torch.std_mean(vectors.double(), dim=0, correction=0)
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 1e-6 * mean.abs().clamp(min=1e-6), deviation, 1.0))


def fit(head: FeatureHead, classifier: str, solver: str, strength: float) -> None:
    """Fit the whole head to its training set, in place; the same set gives the same weights.

    Args:
        classifier: ``linear``, ``svm`` or ``mlp``.
        solver: ``torch`` or ``sklearn``.
        strength: scikit-learn's C: the sum of the losses counts so much against half the squared length of the weights.
    """
    assert head.training_set is not None
    if solver == "sklearn":
        _fit_sklearn(head, head.training_set, classifier, strength)
    else:
        _fit_torch(head, head.training_set, _squared_hinge if classifier == "svm" else _likelihood, strength)


def _fit_torch(head: FeatureHead, data: FeatureSet, losses: Callable[[Tensor, FeatureSet], Tensor], strength: float) -> None:
    """L-BFGS over all examples, from the head as it is."""
    matrices = [layer.weight for layer in (head.hidden, head.output) if layer is not None]
    trained = [parameter.requires_grad for parameter in head.parameters()]
    head.requires_grad_(True)
    # A history of 100, torch's default, costs more than the passes over the data: 0.9 of 1.4 s for 77 labels.
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=MAX_ITERATIONS, tolerance_grad=3e-6, history_size=20, line_search_fn="strong_wolfe"
    )
    total = float(data.weights.sum())
    # Of two classes scikit-learn has one vector: two opposite ones of half its length have half its penalty.
    is_pair = losses is _likelihood and data.task == "single" and head.hidden is None and head.output.out_features == 2
    share = 1.0 if is_pair else 0.5

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = torch.stack([matrix.square().sum() for matrix in matrices]).sum() * share / strength
        loss: Tensor = ((losses(head(data.vectors), data) * data.weights).sum() + penalty) / total
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    head.zero_grad(set_to_none=True)
    for parameter, is_trained in zip(head.parameters(), trained, strict=True):
        parameter.requires_grad_(is_trained)


def _likelihood(logits: Tensor, data: FeatureSet) -> Tensor:
    """(N,) cross-entropy, summed over the labels of a multi-label task, or squared error."""
    if data.task == "single":
        return functional.cross_entropy(logits, data.labels[:, 0].long(), reduction="none")
    if data.task == "multi":
        truth = data.labels[:, : logits.shape[1]].to(logits.dtype)
        return functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(dim=1)
    return (logits - data.labels).square().sum(dim=1) / 2


def _squared_hinge(logits: Tensor, data: FeatureSet) -> Tensor:
    """(N,) squared hinge loss of every label against the rest, as in scikit-learn's LinearSVC. Source: Fan et al. 2008, section 2."""
    count = logits.shape[1]
    truth = functional.one_hot(data.labels[:, 0].long(), count) if data.task == "single" else data.labels[:, :count]
    return (1 - (2 * truth - 1) * logits).clamp(min=0).square().sum(dim=1)


def require_sklearn() -> None:
    """
    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise MissingExtraError("method.solver: `sklearn`", "sklearn")


def _fit_sklearn(head: FeatureHead, data: FeatureSet, classifier: str, strength: float) -> None:
    """Fit by scikit-learn and take its weights over; classes that have no example get a bias that never wins."""
    require_sklearn()
    vectors = ((data.vectors - head.mean) / head.deviation).double().cpu().numpy()
    truth, weights = data.labels[:, 0].long().cpu().numpy(), data.weights.double().cpu().numpy()
    model = _sklearn_model(head, classifier, strength, len(truth)).fit(vectors, truth, sample_weight=weights)
    if classifier == "mlp":
        coefficients, offsets = model.coefs_[-1].T, model.intercepts_[-1]
        assert head.hidden is not None
        head.hidden.weight.data.copy_(torch.from_numpy(model.coefs_[0].T))
        head.hidden.bias.data.copy_(torch.from_numpy(model.intercepts_[0]))
    else:
        coefficients, offsets = model.coef_, model.intercept_
    coefficients, offsets = torch.from_numpy(coefficients), torch.from_numpy(offsets)
    if len(offsets) == 1:  # of two classes, only the second one's
        coefficients, offsets = torch.cat([-coefficients, coefficients]) / 2, torch.cat([-offsets, offsets]) / 2
    with torch.no_grad():
        head.output.weight.zero_()
        head.output.bias.fill_(-1e4)
        head.output.weight[torch.from_numpy(model.classes_)] = coefficients.to(head.output.weight)
        head.output.bias[torch.from_numpy(model.classes_)] = offsets.to(head.output.bias)


def _sklearn_model(head: FeatureHead, classifier: str, strength: float, num_examples: int) -> Any:
    if classifier == "svm":
        from sklearn.svm import LinearSVC

        return LinearSVC(C=strength, dual="auto", random_state=0)
    if classifier == "mlp":
        from sklearn.neural_network import MLPClassifier

        # Its penalty is divided by the number of examples like the loss.
        return MLPClassifier((head.num_hidden or 0,), alpha=1 / strength, random_state=0, max_iter=MAX_ITERATIONS)
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=1000, tol=1e-6)
