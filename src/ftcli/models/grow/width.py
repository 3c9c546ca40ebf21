"""Wider feed-forward networks that compute what the narrow ones did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ftcli.models.grow.growth import Grown, Growth, rebuilt, text_config, unfit, with_text_fields

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size")


class GrowWidth(Growth):
    """More neurons in every feed-forward network, plain or gated, dense or of experts: copies of neurons drawn at random.

    With `start: zero` a copy reads what its original reads and writes nothing yet: logits are unchanged, as a rule to the last bit, and
    what it learns to write is new. With `start: split` original and copy share what the original wrote, entry by entry, at random, so that
    both are at work from the first step; sums in another order round otherwise. `method: {kind: freeze, grown: true}` trains the
    widened matrices alone, old neurons in them, too. Costs memory and time in proportion.

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
        names, tensors = set(), {}
        for name, tensor in model.state_dict().items():
            tensors[name] = tensor
            if name in shapes and shapes[name] != tuple(tensor.shape):
                names.add(name)
                tensors[name] = self._widened(model, name, tensor, shapes[name], picks, seed)
        result = rebuilt(model, config, tensors)
        said = ", ".join(f"`{name}` {value} to {wider[value]}" for name, value in widths.items())
        return Grown(result, frozenset(names), f"{said}, new neurons {'silent' if self.start == 'zero' else 'sharing'}")

    def _widened(
        self, model: PreTrainedModel, name: str, tensor: Tensor, shape: tuple[int, ...], picks: dict[int, torch.Tensor], seed: int
    ) -> Tensor:
        """The tensor with more neurons along the one dimension in which it grows."""
        import torch

        grows = [dim for dim, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)) if old != new]
        size = tensor.shape[grows[0]] if len(grows) == 1 else 0
        order = (2, 1) if "gate_up" in name else (1, 2)
        halves = next((parts for parts in order if size % parts == 0 and size // parts in picks), 0)
        if not halves:
            raise unfit("kind", f"`{name}` of shape {tuple(tensor.shape)} would become {shape}, which is not understood", "kind: blocks")
        dim, pick = grows[0], picks[size // halves].to(tensor.device)
        if not _writes(model, name, tensor, dim):
            # a matrix of gates above values: each half grows by the same neurons
            parts = [torch.cat([half, half.index_select(dim, pick)], dim) for half in tensor.chunk(halves, dim)]
            return torch.cat(parts, dim).contiguous()
        copied = tensor.index_select(dim, pick)
        if self.start == "zero":
            return torch.cat([tensor, torch.zeros_like(copied)], dim).contiguous()
        return _shared(tensor, copied, dim, pick, seed)


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
