"""Freezing: a chosen part of the weights trains, all others stay."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ftcli.errors import Problem, RequestError
from ftcli.methods.subset import Subset

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_MISFIT = "the method does not fit the model"


class Freeze(Subset):
    """The top layers train (or chosen ones, or what patterns name), all others stay as they are.

    By default the top half of the layers trains, with the norm above them. Where only upper layers train, the backward pass ends
    at the lowest of them, and `cache_frozen` spares the forward pass below from the second epoch on. For a base that already
    knows the domain, and where forgetting must stay low.

    The default learning rate was chosen on the embedded model (40 steps of 16 orders; loss of orders and of retained stories, 6.87 and
    0.494 before): 1e-3 gave 0.065 and 0.501, 3e-3 gave 0.015 and 0.614. It is the lower one, at the embedded model's width.

    Source: Lee, Tang and Lin 2019, arXiv:1911.03090, for how few of the top layers are needed.
    """

    kind: Literal["freeze"] = "freeze"
    top_layers: int | None = Field(default=None, ge=0)
    """How many of the last decoder layers train; the default is half of them, rounded up, or none where `layers`, `patterns` or
    `grown` say what trains. A larger value learns more and forgets more."""
    layers: tuple[int, ...] = ()
    """Decoder layers that train, counted from 0; negative numbers count from the last one, -1."""
    patterns: tuple[str, ...] = ()
    """What else trains: ends of module or parameter names (`q_proj`, `mlp.*`, `layers.[01].*`, `norm.weight`)."""
    embeddings: bool = False
    """Train the token and position embeddings, too, and with them a head that is tied to them."""
    head: bool | None = None
    """Train the output head, too; the default leaves it, but for one that is tied to trained embeddings: it is the same weight."""
    final_norm: bool | None = None
    """Train the norm above the last layer; the default does where layers train, and does not where only patterns are given."""
    grown: bool = False
    """Train what `model.grow` has added, in this run or in an earlier one that the base is from, and beside it only what is named here,
    too."""
    cache_frozen: bool = False
    """Keep what the frozen lower layers compute on disk, and skip these layers for every example that was seen before."""

    default_lr: ClassVar[float] = 5e-5

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        if self.top_layers is not None and self.layers:
            raise ValueError("`top_layers` and `layers` are both given: keep one of the two")
        return self

    def trained_names(self, model: PreTrainedModel) -> Collection[str]:
        """The chosen layers, what the patterns name, and the parts that are switched on."""
        from ftcli.methods.parts import decoder_layers, embedding_parameters, final_norm_parameters, head_parameters, layer_of

        stack, modules = decoder_layers(model)
        layers = self._layer_numbers(len(modules))
        self._check_tying(model)
        chosen = {name for name, _ in model.named_parameters() if layer_of(name, stack) in layers}
        chosen |= self._named_by_patterns(model)
        chosen |= self._grown_parameters(model) if self.grown else set()
        chosen |= set(embedding_parameters(model)) if self.embeddings else set()
        chosen |= set(head_parameters(model)) if self.head else set()
        takes_norm = bool(layers) if self.final_norm is None else self.final_norm
        chosen |= set(final_norm_parameters(model)) if takes_norm else set()
        if not chosen:
            raise RequestError("nothing would train", [Problem("method", "no layer, pattern or part is chosen", "top_layers: 2")])
        return chosen

    def frozen_layers(self, module: nn.Module) -> int:
        """How many of the lowest decoder layers are the same function in every epoch and shall be computed once an example.

        Raises:
            RequestError: something trains at or below them.
        """
        if not self.cache_frozen:
            return 0
        from ftcli.methods.parameter_groups import trained_parameters
        from ftcli.methods.parts import decoder_layers, embedding_parameters, final_norm_parameters, head_parameters, in_words, layer_of
        from ftcli.models.load import as_pretrained

        model = as_pretrained(module)
        stack, modules = decoder_layers(model)
        above = {*final_norm_parameters(model), *head_parameters(model)}.difference(embedding_parameters(model))
        trained = [name for name, _ in trained_parameters(model)]
        lowest = min((number for name in trained if (number := layer_of(name, stack)) is not None), default=len(modules))
        below = [name for name in trained if layer_of(name, stack) is None and name not in above]
        if below:
            what = f"{in_words(below, [name for name, _ in model.named_parameters()])} trains below the layers"
        elif lowest == 0:
            what = "the lowest layer trains, so that nothing below it stays the same"
        else:
            return lowest
        hint = "train upper layers only: top_layers: 2"
        raise RequestError("there is nothing to cache", [Problem("method.cache_frozen", what, hint)])

    def _layer_numbers(self, count: int) -> set[int]:
        """The layers that train, counted from 0."""
        if self.layers:
            outside = [number for number in self.layers if not -count <= number < count]
            if outside:
                what = f"{', '.join(map(str, outside))} of a model with {count} decoder layers"
                raise RequestError(_MISFIT, [Problem("method.layers", what, f"allowed: {-count} to {count - 1}")])
            return {number % count for number in self.layers}
        top = self.top_layers if self.top_layers is not None else 0 if self.patterns or self.grown else -(-count // 2)
        if top > count:
            raise RequestError(_MISFIT, [Problem("method.top_layers", f"{top} of a model with {count} decoder layers", f"at most {count}")])
        return set(range(count - top, count))

    def _grown_parameters(self, model: PreTrainedModel) -> frozenset[str]:
        from ftcli.models.grow.growth import grown_parameters

        found = grown_parameters(model)
        if not found:
            raise RequestError(_MISFIT, [Problem("method.grown", "the base was not grown", "`model.grow` says how")])
        return found

    def _check_tying(self, model: PreTrainedModel) -> None:
        """A head that is tied to the embedding trains with it or not at all."""
        from ftcli.methods.targets import is_tied

        if not is_tied(model) or self.head in (None, self.embeddings):
            return
        asked, other = ("head", "embeddings") if self.head else ("embeddings", "head")
        what = f"`{asked}: true` and `{other}: false`, and head and embedding of this model are one weight"
        raise RequestError(_MISFIT, [Problem(f"method.{asked}", what, f"`{other}: true`, or neither")])

    def _named_by_patterns(self, model: PreTrainedModel) -> set[str]:
        """Parameters whose name, or the name of a module around them, ends as one of the patterns says."""
        from ftcli.methods.targets import embedding_name, is_tied, no_match

        modules = [name for name, _ in model.named_modules() if name]
        parameters = dict(model.named_parameters(remove_duplicate=False))
        shared = f"{embedding_name(model)}.weight" if is_tied(model) else None
        own_names = {id(parameter): name for name, parameter in model.named_parameters()}
        chosen: set[str] = set()
        problems = []
        for index, pattern in enumerate(self.patterns):
            found = {own_names[id(parameters[name])] for name in _matched(parameters, modules, pattern)}
            if not found:
                problems.append(no_match(f"method.patterns.{index}", pattern, [*modules, *parameters], "module or parameter"))
            elif shared in found and not self.embeddings:
                what = f"`{pattern}` names the embedding, and the output head of this model is the same weight"
                problems.append(Problem(f"method.patterns.{index}", what, "`embeddings: true` trains both"))
            chosen |= found
        if problems:
            raise RequestError(_MISFIT, problems)
        return chosen


def _matched(parameters: Collection[str], modules: Collection[str], pattern: str) -> set[str]:
    from ftcli.methods.targets import matches

    owners = tuple(f"{name}." for name in modules if matches(name, pattern))
    return {name for name in parameters if matches(name, pattern) or name.startswith(owners)}
