"""The one module that is trained: decoder, gather, head, as a single forward pass over a batch of trees.

Data-parallel wrappers and torch.compile see an ordinary `forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from ftcli.layout.attention import FOREST_ATTENTION, ForestUnsupportedError, register_forest_attention
from ftcli.layout.batch import Batch
from ftcli.models.head import head_transform, target_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def inner_model(module: nn.Module) -> PreTrainedModel:
    """The transformers model inside `module`: PEFT wraps it, and attaches to it in place."""
    get_base_model = getattr(module, "get_base_model", None)
    return cast("PreTrainedModel", get_base_model() if get_base_model is not None else module)


def ordinary_attention_name(model: PreTrainedModel) -> str:
    """The attention of the rows layout and of generation: the one the model was loaded with, or would be."""
    name: str = model.config._attn_implementation
    if name != FOREST_ATTENTION:
        return name
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        return "eager"  # scaled_dot_product_attention knows no soft cap
    return model.get_correct_attn_implementation(None)


class Penalty(Protocol):
    """Something added to the objective that needs the forward pass of a batch."""

    def loss_sum(self, model: TreeModel, batch: Batch, hidden: Tensor) -> Tensor:
        """Nats, summed over the batch's weighted targets, so that the step's normaliser makes it a mean.

        Args:
            hidden: ``(T, D)`` last hidden states of the ordinary forward pass, with their graph.
        """
        ...


class TreeModel(nn.Module):
    """A causal language model as seen by objectives: log-probabilities of a batch's targets."""

    def __init__(self, module: nn.Module, layout: str = "rows") -> None:
        """
        Args:
            module: the base model with whatever a method attached to it.
            layout: ``forest`` or ``rows``; batches must be built for it.
        """
        super().__init__()
        self.module = module
        self.ordinary_attention = ordinary_attention_name(inner_model(module))
        self.transform = head_transform(inner_model(module))
        self.use_layout(layout)

    def use_layout(self, layout: str) -> None:
        """Switch the attention to what batches of `layout` need.

        Raises:
            ForestUnsupportedError: the model's attention cannot be replaced.
        """
        model = inner_model(self.module)
        if layout == "forest" and not model._can_set_attn_implementation():
            raise ForestUnsupportedError("the model's attention cannot be replaced")
        register_forest_attention()
        wanted = FOREST_ATTENTION if layout == "forest" else self.ordinary_attention
        if model.config._attn_implementation != wanted:
            model.set_attn_implementation(wanted)
        self.layout = layout

    def hidden_states(self, batch: Batch) -> Tensor:
        """(T, D) last hidden state of every token slot of the batch."""
        options = {"attention_mask": batch.attention_mask} if batch.forest is None else {"forest": batch.forest}
        decoder = inner_model(self.module).base_model
        output = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **options)
        return cast("Tensor", output.last_hidden_state.flatten(0, 1))

    def forward(self, batch: Batch, penalties: Sequence[Penalty] = ()) -> tuple[Tensor, Tensor] | Tensor:
        """(M,) float32 log-probability of each target of the batch, in nats; with penalties, their sum beside it."""
        hidden = self.hidden_states(batch)
        head = inner_model(self.module).get_output_embeddings()
        log_probs = target_log_probs(hidden[batch.predict_from], batch.targets, head, self.transform)
        if not penalties:
            return log_probs
        # In the same forward pass, so that data-parallel wrappers see one.
        return log_probs, torch.stack([penalty.loss_sum(self, batch, hidden) for penalty in penalties]).sum()
