"""The rows that a run has trained on: those its steps drew, not all that its sources hold."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    for store, rows in zip(data.prepared.train, numbers_seen(data, steps), strict=True):
        for index, found in enumerate(islice(store.entry.source.rows(), max(rows, default=-1) + 1)):
            if index in rows:
                yield found


def numbers_seen(data: DataParts, steps: int) -> list[set[int]]:
    """For each training source the numbers, counted from 0, of its rows of which a part was trained on in the first `steps` steps."""
    stores = data.prepared.train
    seen: list[set[int]] = [set() for _ in stores]
    for step in range(1, min(steps, data.order.num_steps) + 1):
        for source, tree in data.order.examples_at(step):
            seen[source].add(int(stores[source].rows[tree]))
    return seen
