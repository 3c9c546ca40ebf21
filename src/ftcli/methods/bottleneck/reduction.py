"""How narrow the bottleneck of each layer is: one number, or numbers for ranges of layers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ftcli.errors import Problem, RequestError

DEFAULT = "default"
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def layers_in(key: str) -> range | None:
    """The layers that a key names, counted from 0; None for `default` and for what is no range, or a range that ends before it begins.

    Example:
        >>> layers_in("0-3"), layers_in("7"), layers_in("default")
        (range(0, 4), range(7, 8), None)
    """
    found = _RANGE.fullmatch(key)
    layers = range(0) if found is None else range(int(found[1]), int(found[2] or found[1]) + 1)
    return layers or None


def factor_of_each(factors: float | Mapping[str, float], num_layers: int) -> list[float]:
    """The reduction factor of every layer; the first range that holds it counts, then `default`.

    Raises:
        RequestError: a layer has none, or a range ends beyond the last layer.

    Example:
        >>> factor_of_each({"0-1": 16, "default": 32}, 4)
        [16, 16, 32, 32]
    """
    if not isinstance(factors, Mapping):
        return [factors] * num_layers
    ranges = {key: layers_in(key) for key in factors}
    problems = [
        Problem("method.reduction_factor", f"`{key}` names layers that do not exist", f"layers are 0 to {num_layers - 1}")
        for key, layers in ranges.items()
        if layers is not None and layers.stop > num_layers
    ]
    found = [
        next((factors[key] for key, layers in ranges.items() if layers is not None and layer in layers), factors.get(DEFAULT))
        for layer in range(num_layers)
    ]
    missing = [layer for layer, factor in enumerate(found) if factor is None]
    if missing:
        problems.append(Problem("method.reduction_factor", f"layer {missing[0]} has none", "add `default`"))
    if problems:
        raise RequestError("the method does not fit the model", problems)
    return [factor for factor in found if factor is not None]
