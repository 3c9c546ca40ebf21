"""Half fine-tuning: a random half of the matrices trains, the other half keeps what the base knows. Source: arXiv:2404.18466."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from pydantic import Field

from ftcli.methods.whole_model import WholeModel

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ftcli.methods.context import AttachContext

Granularity = Literal["category", "layer", "model"]
T = TypeVar("T")
Unit = tuple[str, ...]
"""Names of parameters that train or rest together: a matrix with its bias, or a norm."""


class Hft(WholeModel):
    """A random half of the weights rests, the other half trains: less is forgotten, and steps are up to a third faster.

    Of every layer half of the attention matrices rest, half of the feed-forward matrices (one or two of three, so that over all
    layers it is half) and half of the norms. Embeddings, head and what else stands outside the layers always train. For whole-model
    training that must keep what the base knows. In a sequence of tasks give every task's run a `seed` of its own, which draws
    another half.

    The default learning rate gives 1.1e-3 on the embedded model, between two that were tried there (40 steps of 16 orders; loss of
    orders and of retained stories, 6.87 and 0.494 before): 4e-4 gave 0.148 and 0.514, 1.5e-3 gave 0.017 and 0.591.

    Source: Hui et al. 2024, arXiv:2404.18466, section 3; a round is one run there, and so it is by default here.
    """

    kind: Literal["hft"] = "hft"
    granularity: Granularity = "category"
    """What is drawn: half of each category in each layer, half of the `layer`s, or half of all matrices and norms of the `model`."""
    round_steps: int | None = Field(default=None, ge=1)
    """Steps after which another half is drawn; the default is one draw for the whole run. What goes to rest loses its optimizer state."""

    default_lr: ClassVar[float] = 5e-5
    rests: ClassVar[bool] = True
    forgets_at_rest: ClassVar[bool] = True

    def attach(self, model: PreTrainedModel, context: AttachContext) -> nn.Module:
        """The model itself, every parameter trainable until the first step says which rest."""
        from ftcli.methods.parts import decoder_layers

        decoder_layers(model)  # refuses what has none
        model.requires_grad_(True)
        return model

    def before_step(self, module: nn.Module, step: int, num_steps: int, seed: int) -> None:
        """Let the half rest that (seed, round) draws."""
        from ftcli.methods.parameter_groups import rest

        number = 0 if self.round_steps is None else (step - 1) // self.round_steps
        resting = resting_half(module, self.granularity, (seed, "hft", number))
        for name, parameter in module.named_parameters():
            rest(parameter, name in resting)

    def what_trains(self, module: nn.Module) -> str | None:
        """The rule: which half it is changes with the round."""
        until = "for the whole run" if self.round_steps is None else f"drawn anew every {self.round_steps} steps"
        return f"a random half of the weights by {self.granularity}, {until}; embeddings and head always"


def resting_half(module: nn.Module, granularity: Granularity, key: tuple[int | str, ...]) -> frozenset[str]:
    """Names of the parameters that rest in the round that `key` names.

    Of n units of a category over all layers, n / 2 rest (rounded down): in every layer half of its own, and of the odd ones left
    over those of every other layer in a random order.
    """
    units = units_by_layer(module)
    if granularity == "layer":
        chosen = _first_half(list(units), (*key, "layers"))
        return frozenset(name for number in chosen for unit in _all(units[number]) for name in unit)
    if granularity == "model":
        every = [unit for categories in units.values() for unit in _all(categories)]
        return frozenset(name for unit in _first_half(every, (*key, "model")) for name in unit)
    resting: list[Unit] = []
    for category in ("attention", "feed_forward", "norm"):
        odd_layers = [number for number, categories in units.items() if len(categories[category]) % 2]
        takes_one_more = set(_first_half(odd_layers, (*key, category)))
        for number, categories in units.items():
            own = _shuffled(categories[category], (*key, category, number))
            resting += own[: len(own) // 2 + (number in takes_one_more)]
    return frozenset(name for unit in resting for name in unit)


def units_by_layer(module: nn.Module) -> dict[int, dict[str, list[Unit]]]:
    """The matrices (with their biases) and norms of every decoder layer, by category: attention, feed_forward, norm."""
    from ftcli.methods.parts import decoder_layers
    from ftcli.models.load import as_pretrained

    stack, layers = decoder_layers(as_pretrained(module))
    units: dict[int, dict[str, list[Unit]]] = {}
    for number, layer in enumerate(layers):
        categories: dict[str, list[Unit]] = {"attention": [], "feed_forward": [], "norm": []}
        for name, owner in layer.named_modules():
            for unit, has_matrix in _units_of(f"{stack}.{number}.{name}" if name else f"{stack}.{number}", owner):
                category = "norm" if not has_matrix else "attention" if "attn" in name or "attention" in name else "feed_forward"
                categories[category].append(unit)
        units[number] = categories
    return units


def _units_of(name: str, owner: nn.Module) -> Iterator[tuple[Unit, bool]]:
    """A module's own parameters: each matrix with the bias that is named after it, or all vectors together; is there a matrix?"""
    own = {key: parameter.ndim > 1 and not key.endswith("bias") for key, parameter in owner.named_parameters(recurse=False)}
    matrices = [key for key, is_matrix in own.items() if is_matrix]
    if not matrices:
        if own:
            yield tuple(f"{name}.{key}" for key in own), False
        return
    rest = [key for key in own if key not in matrices]
    for matrix in matrices:
        # experts stacked in one module: `up_proj` with `up_proj_bias`; a linear layer: `weight` with whatever else it has
        mine = [key for key in rest if len(matrices) == 1 or key.startswith(matrix)]
        yield tuple(f"{name}.{key}" for key in (matrix, *mine)), True


def _all(categories: dict[str, list[Unit]]) -> list[Unit]:
    return [unit for units in categories.values() for unit in units]


def _first_half(things: list[T], key: tuple[int | str, ...]) -> list[T]:
    return _shuffled(things, key)[: len(things) // 2]


def _shuffled(things: list[T], key: tuple[int | str, ...]) -> list[T]:
    """The same things in the order that `key` names, whatever the version of Python."""
    from ftcli.data.permutation import key_of

    return [thing for _, thing in sorted(enumerate(things), key=lambda pair: key_of(*key, pair[0]))]
