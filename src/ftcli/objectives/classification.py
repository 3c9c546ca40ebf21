"""Classification: which label a text has, which labels, or which number.

Two ways to read the answer off a model. A *head* is a linear layer over the last hidden state of one token, or of the mean of
all, as transformers' `AutoModelForSequenceClassification` has it. *Label words* are texts that the language model itself scores:
each label is a branch on the prompt, the prompt is computed once for all of them, and the softmax is over the branches.
Legend: ``M`` targets, ``R`` branches, ``E`` examples, ``C`` classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from ftcli.errors import DataError, Problem, RequestError, did_you_mean
from ftcli.objectives.objective import Losses, ObjectiveSettings, Posed
from ftcli.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ftcli.data.store import TreeStore
    from ftcli.data.tree import TokenTree
    from ftcli.layout.batch import Batch
    from ftcli.models.classifier import ClassHead, ProblemType
    from ftcli.models.tokenizer import Tokenizer
    from ftcli.objectives.label_words import LabelWords

_LISTED = 10
_NUMBER = ("value",)


class OutOfScope(Spec):
    """A text of which no label is sure enough gets none; no such text needs to be trained on."""

    label: str = "oos"
    """What such texts are called, in the predictions and in the evaluation data."""
    threshold: Literal["auto"] | float = Field(default="auto")
    """Probability below which no label is sure enough, in 0..1; a larger value calls more texts out of scope. `auto` takes the one
    with the best accuracy on every second held-out row, and is measured on the others."""

    @model_validator(mode="after")
    def _is_a_share(self) -> Self:
        if self.threshold != "auto" and not 0 <= self.threshold <= 1:
            raise ValueError(f"found {self.threshold}, allowed: `auto`, or a number in 0..1")
        return self


class Classification(ObjectiveSettings):
    """Cross-entropy over labels (`single`), over yes and no of each label (`multi`), or squared error of a number (`regression`)."""

    kind: Literal["classification"] = "classification"
    task: Literal["single", "multi", "regression"] = "single"
    """A text has one label, any number of labels, or a number."""
    readout: Literal["head", "label-words"] = "head"
    """`head` puts a fresh classification head on the base; `label-words` has the language model score the labels' texts."""
    pooling: Literal["last", "first", "mean"] | None = None
    """What of a text the head reads: one token, or the mean of all. The default is what the architecture itself does, and what every
    tool that loads the result does: the last token of a decoder, the first of an encoder."""
    labels: tuple[str, ...] | None = Field(default=None, min_length=1)
    """The labels in the order of the classes; the default is those of the training data, sorted."""
    words: dict[str, str] = {}
    """What the language model reads for a label; the default is the label itself after a space, with spaces for underscores."""
    length_normalised: bool = False
    """Score a label by the mean log-probability of its tokens instead of the sum, so that long ones have a chance untrained."""
    class_weights: Literal["none", "balanced"] | dict[str, float] = "none"
    """How much an example counts by its label: `balanced` is the mean number of examples per label over the label's own."""
    unseen_labels: Literal["error", "count-as-wrong"] = "error"
    """A label in the evaluation data that training never saw: refuse, or count the row as wrong and leave it out of the loss."""
    out_of_scope: OutOfScope | None = None
    """Give no label where none is sure enough."""

    formats: ClassVar[frozenset[str]] = frozenset({"label"})

    _words: LabelWords | None = PrivateAttr(default=None)
    _weights: tuple[float, ...] | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        """Options of one choice beside another would be ignored."""
        if self.readout == "label-words" and self.task != "single":
            raise ValueError(f"found `task: {self.task}` with `readout: label-words`, allowed: `task: single`")
        if self.readout == "label-words" and self.pooling is not None:
            raise ValueError("found `pooling` with `readout: label-words`, allowed: with `readout: head`")
        if self.readout == "head" and (self.words or self.length_normalised):
            raise ValueError("found `words` or `length_normalised` with `readout: head`, allowed: with `readout: label-words`")
        if self.task != "single" and self.out_of_scope is not None:
            raise ValueError(f"found `out_of_scope` with `task: {self.task}`, allowed: with `task: single`")
        if self.task == "regression" and (self.class_weights != "none" or self.labels is not None):
            raise ValueError("found `class_weights` or `labels` with `task: regression`, allowed: without labels")
        return self

    # ---- what only the data tells ----------------------------------------------------------------------------------------

    @property
    def class_labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the head's outputs."""
        if self.task == "regression":
            return _NUMBER
        if self.labels is None:
            raise RequestError("the labels are not known before the data is read", hint="give `objective.labels`")
        return self.labels

    @property
    def head(self) -> ClassHead | None:
        """The classification head; None for label words."""
        if self.readout == "label-words":
            return None
        from ftcli.models.classifier import ClassHead

        kinds: dict[str, ProblemType] = {"single": "single_label_classification", "multi": "multi_label_classification"}
        return ClassHead(self.class_labels, kinds.get(self.task, "regression"), self.pooling)

    def settled(self, train: Sequence[TreeStore], evaluation: Sequence[TreeStore], tokenizer: Tokenizer) -> Self:
        """The same with the labels of the training data.

        Raises:
            DataError: a row has no label or too many, or the evaluation data has labels that are not trained.
        """
        from ftcli.objectives.label_counts import check_evaluation, count_labels

        counts = count_labels(self.task, train)
        if self.task == "regression":
            count_labels(self.task, evaluation)
            return self
        outside = None if self.out_of_scope is None else self.out_of_scope.label
        if outside is not None and outside in counts:
            what = f"{counts[outside]} rows have the label `{outside}`, which is what texts without a label are called"
            raise DataError("the labels cannot be used", [Problem("objective.out_of_scope", what, "leave it out to train it as a label")])
        labels = self.labels if self.labels is not None else tuple(sorted(counts))
        check_labels(labels, counts, self.words, self.class_weights)
        check_evaluation(self.task, evaluation, labels, outside, self.unseen_labels)
        result = self.model_copy(update={"labels": labels})
        result._weights = result._class_weights(counts)
        return result.readied(tokenizer)

    def readied(self, tokenizer: Tokenizer) -> Self:
        """The same with the label words as tokens; the labels are known."""
        if self.readout == "label-words":
            from ftcli.objectives.label_words import LabelWords

            self._words = LabelWords.encoded([self.word(label) for label in self.class_labels], tokenizer)
        return self

    def settled_as(self, other: ObjectiveSettings) -> Self:
        """The same with the labels that a run found."""
        if self.labels is not None or not isinstance(other, Classification) or other.labels is None:
            return self
        return self.model_copy(update={"labels": other.labels})

    def on_few_rows(self) -> Self:
        """The same where the data is cut short, and may lack labels that the recipe names."""
        if self.task == "regression":
            return self
        return self.model_copy(update={"unseen_labels": "count-as-wrong", "words": {}, "class_weights": "none"})

    def word(self, label: str) -> str:
        """What the language model reads for a label."""
        return self.words.get(label, f" {label.replace('_', ' ')}")

    def _class_weights(self, counts: Counter[str]) -> tuple[float, ...] | None:
        """Source: `balanced` as scikit-learn's `compute_class_weight`, after King and Zeng 2001."""
        if self.class_weights == "none":
            return None
        if isinstance(self.class_weights, dict):
            return tuple(self.class_weights.get(label, 1.0) for label in self.class_labels)
        mean = sum(counts[label] for label in self.class_labels) / len(self.class_labels)
        return tuple(mean / counts[label] if counts[label] else 1.0 for label in self.class_labels)

    # ---- what the model gets, and what its answer costs ----------------------------------------------------------------------

    @property
    def num_added_tokens(self) -> int:
        return 0 if self._words is None else self._words.num_tokens

    @property
    def longest_addition(self) -> int:
        return 0 if self._words is None else self._words.longest

    def pose(self, tree: TokenTree, *, is_measured: bool = False) -> Posed:
        """The text with the numbers of its labels; for label words as a prompt with a branch for each label."""
        import numpy as np

        labels, is_known = self._numbers(tree)
        weight = float(tree.spans["weight"].max()) if is_known and len(tree.spans) else 0.0
        if not is_measured and self.task == "single" and self._weights is not None and is_known:
            weight *= self._weights[int(labels[0])]
        if self._words is not None:
            posed, target_weights = self._words.asked_after(tree)
            return Posed(posed, target_weights, weight, num_targets=int(is_known), labels=labels)
        return Posed(tree, np.zeros(len(tree), dtype=np.float32), weight, num_targets=int(is_known), labels=labels)

    def _numbers(self, tree: TokenTree) -> tuple[NDArray[np.float32], bool]:
        """The right answer as numbers, and whether there is one to learn from.

        The index of a label (-1: unseen; for out of scope the index after the last); a 1 for each label and behind them how many
        are unseen; or the number itself.
        """
        import numpy as np

        given = tree.labels or ()
        if self.task == "regression":
            return np.array([float(given[0]) if given else 0.0], dtype=np.float32), bool(given)
        labels = self.class_labels
        if self.task == "multi":
            known = [labels.index(label) for label in given if label in labels]
            numbers = np.zeros(len(labels) + 1, dtype=np.float32)
            numbers[known] = 1
            numbers[-1] = len(set(given)) - len(set(known))
            return numbers, True
        if self.out_of_scope is not None and given == (self.out_of_scope.label,):
            return np.array([len(labels)], dtype=np.float32), False
        index = labels.index(given[0]) if given and given[0] in labels else -1
        return np.array([index], dtype=np.float32), index >= 0

    def losses(self, outputs: Tensor, batch: Batch) -> Losses:
        """Each example's loss: nats of its label, mean nats over the labels' yes and no, or squared error."""
        import torch
        from torch.nn import functional

        assert batch.labels is not None
        assert batch.label_weights is not None
        weights = batch.label_weights
        example = torch.arange(len(weights), device=weights.device)
        logits = self._logits(outputs, batch)
        if self.task == "regression":
            values = (logits - batch.labels).square().squeeze(1)
        elif self.task == "multi":
            scale = None if self._weights is None else torch.tensor(self._weights, device=logits.device, dtype=logits.dtype)
            truth = batch.labels[:, :-1].to(logits.dtype)
            values = functional.binary_cross_entropy_with_logits(logits, truth, weight=scale, reduction="none").mean(dim=1)
        else:
            index = batch.labels[:, 0].long()
            is_class = (index >= 0) & (index < logits.shape[1])
            values = functional.cross_entropy(logits, index.where(is_class, 0), reduction="none")
        return Losses(values, weights, example)

    def _logits(self, outputs: Tensor, batch: Batch) -> Tensor:
        """(E, C) float32 or better."""
        import torch

        if self._words is not None:
            return self._words.scores(outputs, batch, is_mean=self.length_normalised)
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    def scores(self, outputs: Tensor, batch: Batch) -> Tensor:
        """(E, C) probabilities of the labels, or (E, 1) the number."""
        logits = self._logits(outputs, batch)
        if self.task == "regression":
            return logits
        return logits.softmax(dim=1) if self.task == "single" else logits.sigmoid()

    # ---- what a source measures ------------------------------------------------------------------------------------------

    def measures(self, scores: NDArray[np.float64], labels: NDArray[np.float64]) -> dict[str, Any]:
        """Accuracy, macro-F1, calibration; of a regression its errors."""
        from ftcli.metrics import classification as metrics

        if self.task == "regression":
            return dict(metrics.regression_measures(scores[:, 0], labels[:, 0]))
        if self.task == "multi":
            return dict(metrics.multi_label_measures(scores, labels[:, :-1].astype(int), labels[:, -1].astype(int)))
        truth = labels[:, 0].astype(int)
        inside = truth < len(self.class_labels)
        result: dict[str, Any] = dict(metrics.single_label_measures(scores[inside], truth[inside]))
        if self.out_of_scope is not None:
            result |= self._out_of_scope_measures(scores, truth)
        return result

    def _out_of_scope_measures(self, scores: NDArray[np.float64], truth: NDArray[np.int64]) -> dict[str, Any]:
        """The threshold, and accuracy, precision and recall with it, on rows that it was not chosen on."""
        from ftcli.metrics import classification as metrics

        assert self.out_of_scope is not None
        outside, confidence, likeliest = len(self.class_labels), scores.max(axis=1), scores.argmax(axis=1)
        threshold, rest = self.out_of_scope.threshold, slice(0, None)
        if threshold == "auto":
            chosen, rest = slice(0, None, 2), slice(1, None, 2)
            threshold = metrics.best_threshold(confidence[chosen], (likeliest == truth)[chosen], (truth == outside)[chosen])
        predicted = metrics.with_out_of_scope(likeliest[rest], confidence[rest], threshold, outside)
        row = metrics.per_class(truth[rest], predicted, outside + 1)[outside]
        accuracy = metrics.accuracy(truth[rest], predicted)
        return {
            "threshold": threshold,
            "accuracy_with_out_of_scope": accuracy,
            "out_of_scope_precision": row["precision"],
            "out_of_scope_recall": row["recall"],
        }


def check_labels(labels: Sequence[str], counts: Counter[str], words: dict[str, str], weights: str | dict[str, float]) -> None:
    """Refuse labels, words or weights that do not belong together.

    Raises:
        DataError: there are fewer than two labels, or the training data has others.
        RequestError: a word or weight is of no label.
    """
    unlisted = sorted(set(counts) - set(labels))
    if unlisted:
        what = f"the training data has labels that are not listed: {listed(unlisted)}"
        raise DataError("the labels cannot be used", [Problem("objective.labels", what, "leave it out to take those of the data")])
    if len(set(labels)) < 2 or len(set(labels)) != len(labels):
        what = f"found {listed(labels) or 'none'}, allowed: two or more, each once"
        raise DataError("the labels cannot be used", [Problem("objective.labels", what)])
    weight_of: dict[str, float] = weights if isinstance(weights, dict) else {}
    named = [("words", label) for label in words] + [("class_weights", label) for label in weight_of]
    problems = [
        Problem(f"objective.{name}.{label}", "is no label of the training data", did_you_mean(label, list(labels)) or listed(labels))
        for name, label in named
        if label not in labels
    ]
    too_small = [(label, weight) for label, weight in weight_of.items() if not weight > 0]
    problems += [Problem(f"objective.class_weights.{label}", f"found {weight}, allowed: above 0") for label, weight in too_small]
    if problems:
        raise RequestError("the objective does not fit the data", problems)


def listed(labels: Sequence[str]) -> str:
    """Labels as a message shows them: the first ten, and how many more."""
    more = f", ... and {len(labels) - _LISTED} more" if len(labels) > _LISTED else ""
    return ", ".join(f"`{label}`" for label in labels[:_LISTED]) + more
