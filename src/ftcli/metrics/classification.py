"""What a classifier's predictions are worth: pure functions of probabilities and right answers.

Every figure is that of scikit-learn's function of the same name. A truth of -1 is a label that training never saw: it counts as
wrong, and as a class of its own in the macro average, as scikit-learn counts a class that is never predicted.
Legend: ``N`` examples, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

UNSEEN = -1
NUM_BINS = 15


def accuracy(truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Share of right predictions, in 0..1."""
    return float((truth == predicted).mean()) if len(truth) else 0.0


def confusion(truth: NDArray[np.int64], predicted: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """(num_classes, num_classes) how often each class (row) is predicted as each (column); unseen labels are left out.

    Example:
        >>> import numpy as np
        >>> confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
        [[1, 1], [0, 1]]
    """
    import numpy as np

    known = truth != UNSEEN
    table = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(table, (truth[known], predicted[known]), 1)
    return table


def per_class(truth: NDArray[np.int64], predicted: NDArray[np.int64], num_classes: int) -> list[dict[str, float]]:
    """Precision, recall and F1 of each class, in 0..1 and 0 where they are undefined, and its number of examples (`support`)."""
    import numpy as np

    hits = np.bincount(predicted[truth == predicted], minlength=num_classes)
    asserted = np.bincount(predicted, minlength=num_classes)
    there = np.bincount(truth[truth != UNSEEN], minlength=num_classes)
    rows = []
    for hit, said, support in zip(hits.tolist(), asserted.tolist(), there.tolist(), strict=True):
        f1 = 2 * hit / (said + support) if said + support else 0.0
        rows.append({"precision": hit / said if said else 0.0, "recall": hit / support if support else 0.0, "f1": f1, "support": support})
    return rows


def macro_f1(truth: NDArray[np.int64], predicted: NDArray[np.int64], num_classes: int) -> float:
    """Mean F1 of the classes that occur in truth or prediction."""
    rows = per_class(truth, predicted, num_classes)
    import numpy as np

    occurring = set(np.unique(truth).tolist()) | set(np.unique(predicted).tolist())
    return sum(rows[index]["f1"] for index in occurring if index != UNSEEN) / len(occurring) if occurring else 0.0


def calibration_error(probabilities: NDArray[np.float64], truth: NDArray[np.int64], num_bins: int = NUM_BINS) -> float:
    """Mean distance of confidence and accuracy over bins of equal width, weighted by their examples, in 0..1 (ECE).

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3, with its 15 bins.
    """
    import numpy as np

    if not len(truth):
        return 0.0
    sure, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    bins = np.clip(np.ceil(sure * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=right - sure, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(truth))


def equal_mass_bins(sure: NDArray[np.float64], num_bins: int = NUM_BINS) -> NDArray[np.int64]:
    """(N,) the bin of each example, in bins of as equal numbers of examples as equal confidences, which stay together, allow."""
    import numpy as np

    ordered = np.sort(sure)
    edges = ordered[(np.arange(1, num_bins) * len(sure)) // num_bins]
    return np.searchsorted(np.unique(edges), sure, side="right")


def reliability(sure: NDArray[np.float64], is_right: NDArray[np.bool_], bins: NDArray[np.int64]) -> list[dict[str, float]]:
    """For each bin that is not empty its lowest and highest confidence, mean confidence, accuracy and number of examples."""
    parts = [bins == index for index in range(int(bins.max(initial=-1)) + 1)]
    return [
        {
            "low": float(sure[part].min()),
            "high": float(sure[part].max()),
            "confidence": float(sure[part].mean()),
            "accuracy": float(is_right[part].mean()),
            "examples": int(part.sum()),
        }
        for part in parts
        if part.any()
    ]


def macro_f1_of_counts(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Macro-F1 of sums over examples.

    Args:
        sums: ``(..., 3C + 1)`` right predictions, predictions and examples of each class, and examples of unseen labels.

    Returns:
        ``(...)``, the mean over the classes that occur; what `macro_f1` says.
    """
    import numpy as np

    num_classes = (sums.shape[-1] - 1) // 3
    hits, said, there = (sums[..., index * num_classes : (index + 1) * num_classes] for index in range(3))
    f1 = np.where(said + there > 0, 2 * hits / np.maximum(said + there, 1e-300), 0.0)
    occurring = (said + there > 0).sum(axis=-1) + (sums[..., -1] > 0)
    return np.asarray(f1.sum(axis=-1) / np.maximum(occurring, 1))


def brier_score(probabilities: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    """Mean squared distance of the probabilities from the truth, summed over the classes, in 0..2.

    Source: Brier 1950, "Verification of forecasts expressed in terms of probability", equation 2. An unseen label is a class
    that got no probability.
    """
    if not len(truth):
        return 0.0
    known = truth != UNSEEN
    right = probabilities[known.nonzero()[0], truth[known]]
    return float(((probabilities**2).sum() + len(truth) - 2 * right.sum()) / len(truth))


def single_label_measures(probabilities: NDArray[np.float64], truth: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy, macro-F1, calibration error and Brier score of predictions of one label each."""
    predicted = probabilities.argmax(axis=1)
    return {
        "accuracy": accuracy(truth, predicted),
        "macro_f1": macro_f1(truth, predicted, probabilities.shape[1]),
        "ece": calibration_error(probabilities, truth),
        "brier": brier_score(probabilities, truth),
    }


def multi_label_measures(probabilities: NDArray[np.float64], truth: NDArray[np.int64], num_unseen: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy of the whole set, micro- and macro-F1 at a probability of 0.5, and mean Brier score.

    Args:
        truth: ``(N, C)`` 1 for each label that an example has.
        num_unseen: ``(N,)`` labels of each example that training never saw; each is one that was missed.
    """
    predicted = probabilities >= 0.5
    hits = (predicted & (truth == 1)).sum(axis=0)
    said, there = predicted.sum(axis=0), truth.sum(axis=0)
    f1 = [2 * hit / total if total else 0.0 for hit, total in zip(hits.tolist(), (said + there).tolist(), strict=True)]
    total = int(said.sum() + there.sum() + num_unseen.sum())
    return {
        "accuracy": float(((predicted == (truth == 1)).all(axis=1) & (num_unseen == 0)).mean()),
        "micro_f1": float(2 * hits.sum() / total) if total else 0.0,
        "macro_f1": sum(f1) / len(f1),
        "brier": float(((probabilities - truth) ** 2).mean()),
    }


def regression_measures(values: NDArray[np.float64], truth: NDArray[np.float64]) -> dict[str, float | None]:
    """Root of the mean squared error, mean absolute error, R2, and Pearson's correlation; None where the truth does not vary."""
    import numpy as np

    errors, spread = values - truth, float(((truth - truth.mean()) ** 2).sum())
    varies = spread > 0 and float(values.std()) > 0
    return {
        "rmse": float(np.sqrt((errors**2).mean())),
        "mae": float(np.abs(errors).mean()),
        "r2": 1 - float((errors**2).sum()) / spread if spread > 0 else None,
        "pearson": float(np.corrcoef(values, truth)[0, 1]) if varies else None,
    }


def best_threshold(confidence: NDArray[np.float64], is_right: NDArray[np.bool_], is_outside: NDArray[np.bool_]) -> float:
    """The threshold with the best accuracy: what is less sure is called out of scope.

    Args:
        confidence: ``(N,)`` probability of the likeliest class.
        is_right: ``(N,)`` whether that class is the right one.
        is_outside: ``(N,)`` whether the example is out of scope.

    Returns:
        A number in 0..1, in the middle between two examples, so that examples a little different fare alike.

    Example:
        >>> import numpy as np
        >>> best_threshold(np.array([0.9, 0.8, 0.4]), np.array([True, True, False]), np.array([False, False, True]))
        0.6000000000000001
    """
    import numpy as np

    order = np.argsort(confidence, kind="stable")
    sure = confidence[order]
    # With the threshold before place k, the k least sure are called out of scope.
    outside = np.concatenate([[0], np.cumsum(is_outside[order])])
    inside = np.concatenate([np.cumsum(is_right[order][::-1])[::-1], [0]])
    edges = np.concatenate([[0.0], (sure[1:] + sure[:-1]) / 2, [1.0]])
    # Equal confidences cannot be told apart.
    possible = np.concatenate([[True], sure[1:] > sure[:-1], [True]])
    return float(edges[np.where(possible, outside + inside, -1).argmax()])


def with_out_of_scope(predicted: NDArray[np.int64], confidence: NDArray[np.float64], threshold: float, outside: int) -> NDArray[np.int64]:
    """The predictions, with `outside` wherever the classifier is less sure than `threshold`."""
    import numpy as np

    return np.where(confidence < threshold, outside, predicted)


def report(probabilities: NDArray[np.float64], truth: NDArray[np.int64], labels: Sequence[str]) -> dict[str, Any]:
    """The measures, the table of classes, and the confusion matrix with its labels."""
    predicted = probabilities.argmax(axis=1)
    rows = per_class(truth, predicted, len(labels))
    return {
        **single_label_measures(probabilities, truth),
        "examples": len(truth),
        "unseen_labels": int((truth == UNSEEN).sum()),
        "classes": [{"label": label, **row} for label, row in zip(labels, rows, strict=True)],
        "confusion": {"labels": list(labels), "rows_are": "truth", "counts": confusion(truth, predicted, len(labels)).tolist()},
    }
