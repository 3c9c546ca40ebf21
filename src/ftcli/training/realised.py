"""What a run has seen of each source, as it came about: tokens, share, passes, and the loss it began and ended with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftcli.data.order import Order
    from ftcli.data.store import TreeStore
    from ftcli.training.loop import Progress


def realised_mixture(
    stores: Sequence[TreeStore], order: Order, progress: Progress, records: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One entry per training source.

    Args:
        records: of metrics.jsonl.

    Returns:
        ``name``, ``role``, ``tokens`` seen, ``share`` of all tokens seen in 0..1, ``share_planned``, ``passes`` over the source, and
        ``first_loss`` and ``last_loss``, in nats per target, of the first and the last log line that had the source.
    """
    total = max(1, sum(progress.source_tokens))
    found = []
    for index, (store, planned) in enumerate(zip(stores, order.planned_shares(), strict=True)):
        tokens = progress.source_tokens[index] if progress.source_tokens else 0
        losses = [record["sources"][store.name] for record in records if record["kind"] == "train" and store.name in record["sources"]]
        found.append(
            {
                "name": store.name,
                "role": store.role,
                "tokens": tokens,
                "share": tokens / total,
                "share_planned": planned,
                "passes": tokens / max(1, store.report.num_tokens),
                "first_loss": losses[0] if losses else None,
                "last_loss": losses[-1] if losses else None,
            }
        )
    return found
