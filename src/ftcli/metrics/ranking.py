"""What a ranking of documents is worth, for each query: pure functions of scores and relevance.

Legend: ``Q`` queries, ``K`` ranks, the best first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]


def recall_at(gains: Numbers, num_relevant: Numbers, k: int) -> Numbers:
    """(Q,) share of a query's relevant documents among the first k.

    Args:
        gains: ``(Q, K)`` grade of the document at each rank, 0 for one that is not relevant; K is at least k, or all documents.
        num_relevant: ``(Q,)`` relevant documents of the query, at least 1.
    """
    import numpy as np

    return np.asarray((gains[:, :k] > 0).sum(axis=1) / num_relevant)


def reciprocal_rank(gains: Numbers) -> Numbers:
    """(Q,) 1 / rank of the first relevant document, 0 where there is none among the ranks.

    Example:
        >>> import numpy as np
        >>> reciprocal_rank(np.array([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])).tolist()
        [0.5, 0.0]
    """
    import numpy as np

    hits = gains > 0
    return np.where(hits.any(axis=1), 1 / (1 + hits.argmax(axis=1)), 0.0)


def ndcg_at(gains: Numbers, ideal: Numbers, k: int) -> Numbers:
    """(Q,) discounted gain of the first k documents over that of the best order.

    Args:
        gains: ``(Q, K)`` grade of the document at each rank.
        ideal: ``(Q, K')`` the query's grades in falling order, filled up with 0.

    Source: Jarvelin and Kekalainen 2002, with the grade itself as the gain, which scikit-learn takes, too.
    """
    import numpy as np

    def discounted(grades: Numbers) -> Numbers:
        first = grades[:, :k]
        return np.asarray((first / np.log2(np.arange(2, first.shape[1] + 2))).sum(axis=1))

    return discounted(gains) / discounted(ideal)
