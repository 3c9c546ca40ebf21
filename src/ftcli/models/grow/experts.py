"""A mixture of experts from a dense model: every expert begins as the feed-forward network that was there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from ftcli.errors import RequestError
from ftcli.models.grow.growth import Grown, Growth, rebuilt, unfit

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_NOT_TAKEN = ("model_type", "architectures", "transformers_version")
_ROUTER_STD = 0.02


@dataclass(frozen=True)
class _Sibling:
    """The architecture that is a dense one with experts."""

    model_type: str
    feed_forward: str
    """Name of the module of experts in a layer, in place of `mlp`."""
    num_experts: str
    fields: Callable[[Mapping[str, Any]], dict[str, Any]] = field(default=lambda dense: {})
    """What else its configuration needs to compute what the dense one does."""


def _qwen3_fields(dense: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "moe_intermediate_size": dense["intermediate_size"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


_SIBLINGS = {
    "llama": _Sibling("mixtral", "mlp", "num_local_experts", lambda dense: {"sliding_window": None}),
    "mistral": _Sibling("mixtral", "mlp", "num_local_experts"),
    "qwen3": _Sibling("qwen3_moe", "mlp", "num_experts", _qwen3_fields),
    "granite": _Sibling("granitemoe", "block_sparse_moe", "num_local_experts"),
}


def _sibling(model_type: str) -> _Sibling:
    """What a dense architecture becomes.

    Raises:
        RequestError: there is nothing that it could become.
    """
    if model_type not in _SIBLINGS:
        raise _without_sibling(model_type)
    return _SIBLINGS[model_type]


def _without_sibling(named: str) -> RequestError:
    kinds = ", ".join(f"{name} -> {other.model_type}" for name, other in _SIBLINGS.items())
    return unfit("kind", f"a `{named}` has no sibling with experts", f"language models: {kinds}")


class GrowExperts(Growth):
    """Every feed-forward network becomes so many copies of itself, of which a new router picks some for each token.

    The weights of those picked sum to one, so that the outputs are the base's up to rounding; routers begin at random and send
    different tokens to different copies, which is how these grow apart. `method: full` trains all, `{kind: freeze, grown: true}` the
    experts and routers alone. Costs memory for all experts and time for those picked. For many tokens of several domains. llama
    and mistral become mixtral, qwen3 becomes qwen3_moe, granite becomes granitemoe.

    Source: Komatsuzaki et al. 2022, arXiv:2212.05055, section 3.
    """

    kind: Literal["experts"] = "experts"
    num_experts: int = Field(default=4, ge=2)
    """Copies of every feed-forward network; a larger value can learn more and costs memory."""
    experts_per_token: int = Field(default=2, ge=1)
    """Of which so many compute each token; a larger value costs time."""

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"`experts_per_token` is {self.experts_per_token}, and there are {self.num_experts} experts")
        return self

    def require_fit(self, fields: Mapping[str, Any]) -> None:
        """The architecture has a sibling."""
        if "model_type" in fields:
            _sibling(fields["model_type"])

    def grown(self, model: PreTrainedModel, seed: int) -> Grown:
        """A model of the sibling architecture."""
        import dataclasses

        import torch
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        dense = model.config
        sibling = _sibling(dense.model_type)
        if model.get_output_embeddings() is None:
            raise _without_sibling(type(model).__name__)
        config_class = CONFIG_MAPPING[sibling.model_type]
        known = {item.name for item in dataclasses.fields(config_class)} | set(config_class.attribute_map)
        fields = {name: value for name, value in dense.to_dict().items() if name in known and name not in _NOT_TAKEN}
        fields |= sibling.fields(dense.to_dict())
        fields |= {sibling.num_experts: self.num_experts, "num_experts_per_tok": self.experts_per_token}
        config = config_class.from_dict(fields)
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in model_class._from_config(config).state_dict().items()}
        own = model.state_dict()
        tensors: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            tensors[name] = own[name] if name in own else self._expert(name, tuple(shape), own, sibling, generator)
        left = sorted(name for name in own if name not in tensors and ".mlp." not in name)
        biases = sorted(name for name in own if ".mlp." in name and name.endswith("bias"))
        if left or biases:
            raise unfit("kind", f"a `{sibling.model_type}` has no place for {', '.join([*left, *biases][:3])}")
        result = rebuilt(model, config, tensors, model_class)
        marker = f".{sibling.feed_forward}."
        names = frozenset(name for name, _ in result.named_parameters() if marker in name)
        numbers = f"{self.num_experts} experts in every layer, {self.experts_per_token} for a token"
        detail = f"{dense.model_type} to {sibling.model_type}: {numbers}"
        return Grown(result, names, detail)

    def _expert(self, name: str, shape: tuple[int, ...], own: Mapping[str, Tensor], sibling: _Sibling, generator: Any) -> Tensor:
        """A tensor of the mixture that the dense model does not have: stacked copies, or a router."""
        import torch

        layer, _, rest = name.partition(f".{sibling.feed_forward}.")
        parts = {"experts.gate_up_proj": ("gate_proj", "up_proj"), "experts.down_proj": ("down_proj",)}.get(rest)
        like = next(iter(own.values()))
        if parts is None and rest.endswith(("gate.weight", "router.weight")):
            return (torch.randn(shape, generator=generator) * _ROUTER_STD).to(like.device, like.dtype)
        sources = [own.get(f"{layer}.mlp.{part}.weight") for part in parts or ()]
        found = [source for source in sources if source is not None]
        if not found or len(found) != len(sources):
            raise unfit("kind", f"the dense model has nothing for `{name}`")
        return torch.cat(found).expand(shape).clone()
