"""The rows that a run has trained on: those its steps drew, not all that its sources hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ftcli.data.store import TreeStore
    from ftcli.recipe.recipe import Recipe
    from ftcli.training.assemble import DataParts


def rows_seen(recipe: Recipe, steps: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every row of which a part was trained on in the first `steps` steps, once, in the order of the sources.

    Limits, rows held out or left out, shares of a mixture and the end of the run count, as the data is put together again as training
    did, from the cache where it is there.

    Raises:
        RequestError: the data or the tokenizer cannot be read.
    """
    from ftcli.training.assemble import assemble_data

    data = assemble_data(recipe, None)
    for store, seen in zip(data.prepared.train, drawn(data, 1, steps), strict=True):
        yield from rows_of(store, seen)


def rows_of(store: TreeStore, seen: NDArray[np.bool_]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of the rows of a source of which `seen` says so."""
    for is_seen, found in zip(seen, store.entry.source.rows(), strict=False):
        if is_seen:
            yield found


def drawn(data: DataParts, first: int, last: int) -> list[NDArray[np.bool_]]:
    """For each training source which of its rows, as far as the last of them, the steps from `first` to `last` have seen a part of."""
    import numpy as np

    rows = [store.rows for store in data.prepared.train]
    seen = [np.zeros(int(numbers.max()) + 1, dtype=bool) for numbers in rows]
    for step in range(first, min(last, data.order.num_steps) + 1):
        for source, tree in data.order.examples_at(step):
            seen[source][rows[source][tree]] = True
    return [found[: len(found) - int(found[::-1].argmax())] if found.any() else found[:0] for found in seen]
