"""Answers of a model with a soft prompt: what is computed instead of `model.generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from ftcli.layout.model import inner_model
from ftcli.layout.virtual import filled_cache, soft_prompt_members, virtual_tokens

if TYPE_CHECKING:
    from torch import nn
    from transformers import GenerationConfig


class LogProbRecorder:
    """Sees the scores of every next token, and then which token it was; keeps one number a row and token."""

    def __init__(self) -> None:
        self._scores: torch.Tensor | None = None
        self._log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._scores is not None:
            self._note(input_ids[:, -1])
        self._scores = scores.float().log_softmax(dim=-1)
        return scores

    def _note(self, tokens: torch.Tensor) -> None:
        assert self._scores is not None
        self._log_probs.append(self._scores.gather(1, tokens[:, None]).squeeze(1).double().cpu())

    def log_prob(self, row: int, tokens: Sequence[int]) -> float:
        """Nats, summed over the first `tokens` made in `row`; the last token of all is the one that no call has shown."""
        found = [float(column[row]) for column in self._log_probs[: len(tokens)]]
        if len(tokens) > len(found):
            assert self._scores is not None
            found.append(float(self._scores[row, tokens[-1]]))
        return sum(found)


def continue_prompted(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: GenerationConfig, **options: Any
) -> list[list[int]]:
    """The up to N tokens after each of B left-padded prompts; each member of an ensemble gets a row for every prompt.

    By the model inside: PEFT's own `generate` puts a prompt before the padding, where the text sees it from further away.

    Returns:
        One row a prompt and member, the members of a prompt side by side.
    """
    inner: Any = inner_model(model)
    prompts = [virtual_tokens(model, member) for member in soft_prompt_members(model)]
    num_virtual, num_prompts = len(prompts[0]), len(input_ids)
    input_ids, attention_mask = (rows.repeat_interleave(len(prompts), dim=0) for rows in (input_ids, attention_mask))
    starts = (attention_mask == 0).sum(dim=1)
    # The virtual tokens' slots come first, and are then moved behind the padding.
    virtual_slots = input_ids.new_zeros(len(input_ids), num_virtual)
    if prompts[0].embeddings is None:
        layers = zip(*(prompt.key_values for prompt in prompts), strict=True)
        key_values = tuple(
            tuple(torch.cat(parts).repeat(num_prompts, 1, 1, 1) for parts in zip(*members, strict=True)) for members in layers
        )
        inputs = {
            "input_ids": torch.cat([virtual_slots, input_ids], dim=1),
            "attention_mask": torch.cat([virtual_slots + 1, attention_mask], dim=1),
            "past_key_values": filled_cache(inner, cast("Any", key_values), len(input_ids)),
        }
        output = inner.generate(**inputs, generation_config=settings, **options)
        return cast("list[list[int]]", output[:, num_virtual + input_ids.shape[1] :].tolist())
    embedded = inner.get_input_embeddings()(torch.cat([virtual_slots, input_ids], dim=1))
    width = embedded.shape[1]
    for row, start in enumerate(starts.tolist()):
        embedded[row, start : start + num_virtual] = cast("torch.Tensor", prompts[row % len(prompts)].embeddings)
    full_mask = (torch.arange(width, device=starts.device) >= starts[:, None]).long()
    output = inner.generate(inputs_embeds=embedded, attention_mask=full_mask, generation_config=settings, **options)
    return cast("list[list[int]]", output.tolist())
