"""Which examples of a step share a forward pass: a pure function, so that every process knows the whole plan."""

from __future__ import annotations

from collections.abc import Sequence

from ftcli.errors import RequestError


def plan_micro_batches(lengths: Sequence[int], num_processes: int, budget: int) -> list[list[list[int]]]:
    """Cut a step's examples into micro-batches, balanced over processes.

    Examples of like length share a micro-batch, which is what the rows layout needs to pad little. A single example above the
    budget gets a micro-batch of its own. Every process gets at least one.

    Args:
        lengths: tokens of each example of the step.
        budget: tokens of one micro-batch.

    Returns:
        For each process its micro-batches, each a list of indices into `lengths`.

    Raises:
        RequestError: fewer examples than processes.

    Example:
        >>> plan_micro_batches([5, 9, 4], 1, 10)
        [[[1], [0, 2]]]
    """
    if len(lengths) < num_processes:
        raise RequestError(f"a step of {len(lengths)} examples cannot be shared by {num_processes} processes")
    shares: list[list[int]] = [[] for _ in range(num_processes)]
    loads = [0] * num_processes
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # An idle process first: with examples of length 0 the lightest one might otherwise never get any.
        lightest = min(range(num_processes), key=lambda p: (len(shares[p]) > 0, loads[p], p))
        shares[lightest].append(index)
        loads[lightest] += lengths[index]
    return [_cut(share, lengths, budget) for share in shares]


def _cut(share: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """`share`, longest first, cut wherever the next example would break the budget."""
    micro_batches: list[list[int]] = []
    filled = 0
    for index in share:
        if not micro_batches or filled + lengths[index] > budget:
            micro_batches.append([])
            filled = 0
        micro_batches[-1].append(index)
        filled += lengths[index]
    return micro_batches
