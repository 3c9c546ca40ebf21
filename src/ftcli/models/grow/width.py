"""Wider feed-forward networks that compute what the narrow ones did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ftcli.models.grow.growth import Grown, Growth, rebuilt, text_config, unfit, with_text_fields

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size")


class GrowWidth(Growth):
    """More neurons in every feed-forward network, plain or gated, dense or of experts: copies of neurons drawn at random.

    With `start: zero` a copy reads what its original reads and writes nothing yet: every weight of the base is there to the last bit, and
    what is new adds exactly 0, both of which are checked. Logits are then unchanged up to the order in which a matrix product sums its
    terms, which goes by how many there are: by 0 on a trained Llama of width 64, 1.1e-05 on a trained GPT-2 of width 128 (2e-14 in
    float64). Where every bit of the output counts take `blocks`. What a copy learns to write is new.

    With `start: split` original and copy share what the original wrote, entry by entry, at random, so that both are at work from the
    first step; sums in another order round otherwise. `method: {kind: freeze, grown: true}` trains the widened matrices alone, old
    neurons in them, too. Costs memory and time in proportion.

    Source: Chen, Goodfellow and Shlens 2015 (Net2Net), arXiv:1511.05641, section 2.2, where a copy takes an equal share and noise
    tells the two apart; sharing by entries needs no noise, so that nothing is lost.
    """

    kind: Literal["width"] = "width"
    factor: float = Field(default=1.5, gt=1)
    """Neurons after over neurons before; a larger value learns more and costs more, at inference, too."""
    start: Literal["zero", "split"] = "zero"
    """What new neurons write at first: nothing, or a half of what their originals wrote."""

    def grown(self, model: PreTrainedModel, seed: int) -> Grown:
        """The model with more neurons, all other sizes the same."""
        import torch

        text = text_config(model.config)
        fields = text.to_dict()
        widths = {name: value for name, value in fields.items() if name in _WIDTHS and isinstance(value, int) and value > 0}
        if fields.get("n_inner", 0) is None:  # GPT-2 leaves its four times unsaid
            widths["n_inner"] = 4 * int(text.hidden_size)
        if not widths:
            raise unfit("kind", f"a `{text.model_type}` has no number of neurons in its configuration", "kind: blocks")
        wider = {value: max(value + 1, round(value * self.factor)) for value in widths.values()}
        config = with_text_fields(model.config, {**fields, **{name: wider[value] for name, value in widths.items()}})
        with torch.device("meta"):
            wide = type(model)._from_config(config, dtype=model.dtype).state_dict()
            shapes = {name: tuple(tensor.shape) for name, tensor in wide.items()}
        picks = {old: torch.randint(0, old, (new - old,), generator=torch.Generator().manual_seed(seed)) for old, new in wider.items()}
        places, tensors = {}, {}
        for name, tensor in model.state_dict().items():
            tensors[name] = tensor
            if name in shapes and shapes[name] != tuple(tensor.shape):
                place = _place(model, name, tensor, shapes[name], picks)
                places[name] = place, tensor
                tensors[name] = self._widened(tensor, place, picks[place.size].to(tensor.device), seed)
        result = rebuilt(model, config, tensors)
        said = ", ".join(f"`{name}` {value} to {wider[value]}" for name, value in widths.items())
        if self.start == "split":
            return Grown(result, frozenset(places), f"{said}, new neurons sharing")
        wide = result.state_dict()
        if changed := [name for name, (place, tensor) in places.items() if not _is_kept(tensor, wide[name], place)]:
            raise unfit("kind", f"old neurons would not be what they were: {', '.join(changed[:3])}", "kind: blocks")
        silent = "new neurons silent: old ones are there to the last bit, and new ones write exactly 0"
        return Grown(result, frozenset(places), f"{said}, {silent}")

    def _widened(self, tensor: Tensor, place: _Place, pick: Tensor, seed: int) -> Tensor:
        """The tensor with more neurons along the one dimension in which it grows."""
        import torch

        if not place.writes:
            # a matrix of gates above values: each half grows by the same neurons
            parts = [torch.cat([half, half.index_select(place.dim, pick)], place.dim) for half in tensor.chunk(place.parts, place.dim)]
            return torch.cat(parts, place.dim).contiguous()
        copied = tensor.index_select(place.dim, pick)
        if self.start == "zero":
            return torch.cat([tensor, torch.zeros_like(copied)], place.dim).contiguous()
        return _shared(tensor, copied, place.dim, pick, seed)


@dataclass(frozen=True)
class _Place:
    """Where a tensor holds its neurons."""

    dim: int
    parts: int
    """2 where gates stand above values in one tensor."""
    size: int
    """Neurons before."""
    writes: bool
    """It holds what neurons write, and not what they read."""


def _place(model: PreTrainedModel, name: str, tensor: Tensor, shape: tuple[int, ...], picks: dict[int, Tensor]) -> _Place:
    """Where `tensor` grows to become `shape`.

    Raises:
        RequestError: not along one dimension of neurons.
    """
    grows = [dim for dim, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)) if old != new]
    size = tensor.shape[grows[0]] if len(grows) == 1 else 0
    order = (2, 1) if "gate_up" in name else (1, 2)
    parts = next((parts for parts in order if size % parts == 0 and size // parts in picks), 0)
    if not parts:
        raise unfit("kind", f"`{name}` of shape {tuple(tensor.shape)} would become {shape}, which is not understood", "kind: blocks")
    return _Place(grows[0], parts, size // parts, _writes(model, name, tensor, grows[0]))


def _is_kept(old: Tensor, wide: Tensor, place: _Place) -> bool:
    """Is every old number there to the last bit, and all that new neurons write exactly 0?"""
    import torch

    for own, grown in zip(old.chunk(place.parts, place.dim), wide.chunk(place.parts, place.dim), strict=True):
        kept, new = grown.split([place.size, grown.shape[place.dim] - place.size], place.dim)
        if not torch.equal(kept, own) or (place.writes and bool(new.any())):
            return False
    return True


def _writes(model: PreTrainedModel, name: str, tensor: Tensor, dim: int) -> bool:
    """Is this dimension of a tensor what it reads (and so neurons that write), and not what it makes?"""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    owner: Any = model.get_submodule(name.rpartition(".")[0])
    if tensor.ndim == 1:
        return False
    if isinstance(owner, Conv1D):
        return dim == 0
    if isinstance(owner, nn.Linear):
        return dim == 1
    return dim == tensor.ndim - 1  # stacked experts: (experts, out, in)


def _shared(tensor: Tensor, copied: Tensor, dim: int, pick: Tensor, seed: int) -> Tensor:
    """What originals wrote, each entry given to the original or to one of its copies.

    A neuron that was drawn more than once shares with each copy in turn what is left to it.
    """
    import torch

    result = torch.cat([tensor, torch.zeros_like(copied)], dim).movedim(dim, 0).clone()
    generator = torch.Generator().manual_seed(seed + 1)
    for index, original in enumerate(pick.tolist()):
        given = (torch.rand(result[original].shape, generator=generator) < 0.5).to(result.device)
        result[len(tensor.movedim(dim, 0)) + index] = torch.where(given, result[original], 0)
        result[original] = torch.where(given, 0, result[original])
    return result.movedim(0, dim).contiguous()
