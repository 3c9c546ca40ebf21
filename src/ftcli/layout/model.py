"""The one module that is trained: decoder, gather, head, as a single forward pass over a batch of trees.

Data-parallel wrappers and torch.compile see an ordinary `forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from ftcli.errors import RequestError
from ftcli.layout.attention import FOREST_ATTENTION, ForestUnsupportedError, register_forest_attention
from ftcli.layout.batch import Batch
from ftcli.layout.readout import own_logits, runs_own_head, token_logits
from ftcli.layout.virtual import VirtualTokens, decoder_inputs, soft_prompt_members, virtual_tokens
from ftcli.models.classifier import is_encoder
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
    """Something added to the objective, computed in the forward pass of a batch."""

    @property
    def reads_hidden(self) -> bool:
        """It needs the last hidden states of the batch, and not the weights alone."""
        ...

    def loss_sum(self, model: TreeModel, batch: Batch, hidden: Tensor) -> Tensor:
        """Nats, summed over the batch's weighted targets, so that the step's normaliser makes it a mean.

        Args:
            hidden: ``(T, D)`` last hidden states of the ordinary forward pass, with their graph; empty if no penalty reads them.
        """
        ...


class TreeModel(nn.Module):
    """A model as seen by objectives: log-probabilities of a batch's targets, or logits of a classifier for its branches."""

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
        self.lower_layers: Callable[[Batch], AbstractContextManager[None]] | None = None
        """Put around the decoder's forward pass where its lower layers need not be computed."""
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
        """(T, D) last hidden state of every token slot of the batch, after the soft prompt where the method has one.

        Raises:
            RequestError: several soft prompts compute together, and only their log-probabilities can be averaged.
        """
        members = soft_prompt_members(self.module)
        if len(members) > 1:
            raise RequestError("method.ensemble: an ensemble of soft prompts trains on log-probabilities only", hint="ensemble: 1")
        return self._hidden_states(batch, virtual_tokens(self.module, members[0]) if members else None)

    def _hidden_states(self, batch: Batch, virtual: VirtualTokens | None) -> Tensor:
        """(T, D); what stands in the virtual slots is cut off."""
        model = inner_model(self.module)
        inputs = decoder_inputs(model, batch, virtual)
        if is_encoder(model):
            del inputs["position_ids"]  # an encoder may count its positions from another number than 0
        else:
            inputs["use_cache"] = False
        with self.lower_layers(batch) if self.lower_layers is not None else nullcontext():
            output = model.base_model(**inputs)
        hidden = output.last_hidden_state
        num_virtual = hidden.shape[1] - batch.input_ids.shape[1]
        return cast("Tensor", hidden[:, num_virtual:].flatten(0, 1))

    def forward(self, batch: Batch, penalties: Sequence[Penalty] = ()) -> tuple[Tensor, Tensor] | Tensor:
        """(M,) float32 log-probability of each target of the batch, in nats; of a classifier (R, C) logits. With penalties, the
        ``loss_sum`` of each beside it, ``(P,)`` float32.

        Of an ensemble of soft prompts it is the members' mean, so that its loss is the mean of their losses.
        """
        if not penalties:
            return self._answers(batch)
        # In the same forward pass, so that data-parallel wrappers see one.
        if any(penalty.reads_hidden for penalty in penalties):
            if runs_own_head(inner_model(self.module)):
                raise RequestError("method: its penalty needs hidden states, which the head of this encoder does not give")
            hidden = self.hidden_states(batch)
            outputs = self._outputs(batch, hidden)
        else:
            outputs = self._answers(batch)
            hidden = outputs.new_zeros((0, 0))
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        return outputs, torch.stack([penalty.loss_sum(self, batch, hidden).to(dtype) for penalty in penalties])

    def _answers(self, batch: Batch) -> Tensor:
        """What `forward` gives without penalties."""
        model = inner_model(self.module)
        if batch.features is not None:
            return cast("Tensor", model.score(batch.features))  # type: ignore[operator]
        if runs_own_head(model):
            return own_logits(model, batch)
        members = soft_prompt_members(self.module)
        if len(members) > 1:
            states = (self._hidden_states(batch, virtual_tokens(self.module, member)) for member in members)
            return torch.stack([self._outputs(batch, hidden) for hidden in states]).mean(dim=0)
        return self._outputs(batch, self.hidden_states(batch))

    def log_probs_after(self, batch: Batch, prefix: VirtualTokens | None) -> Tensor:
        """(M,) what `forward` gives, with tokens computed before standing in front of all trees."""
        return cast("Tensor", self(batch)) if prefix is None else self._outputs(batch, self.hidden_states_after(batch, prefix))

    def hidden_states_after(self, batch: Batch, prefix: VirtualTokens) -> Tensor:
        """(T, D) last hidden state of every token slot, with tokens computed before standing in front of all trees."""
        return self._hidden_states(batch, prefix)

    def _outputs(self, batch: Batch, hidden: Tensor) -> Tensor:
        model = inner_model(self.module)
        if (logits := token_logits(model, hidden, batch)) is not None:
            return logits
        head = model.get_output_embeddings()
        return target_log_probs(hidden[batch.predict_from], batch.targets, head, self.transform)
