"""One state for each branch of a batch: what a classification head reads.

Legend: ``T`` token slots, ``D`` hidden size, ``R`` branches, ``S`` segments, ``C`` classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftcli.layout.attention import ForestUnsupportedError
from ftcli.models.classifier import POOLING_FIELD, has_token_head, is_classifier, is_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftcli.layout.attention import Forest
    from ftcli.layout.batch import Batch


def pooled(hidden: Tensor, batch: Batch, pooling: str) -> Tensor:
    """(R, D) state of the last or the first token of each branch, or the mean over all its tokens.

    Args:
        hidden: ``(T, D)`` last hidden states.
    """
    if pooling == "last":
        return hidden[batch.readout]
    if batch.forest is not None:
        return _pooled_forest(hidden, batch.forest, pooling)
    assert batch.attention_mask is not None
    rows = hidden.view(*batch.input_ids.shape, -1)
    if pooling == "first":
        return rows[:, 0]
    mask = batch.attention_mask.to(hidden.dtype)[:, :, None]
    return (rows * mask).sum(dim=1) / mask.sum(dim=1)


def _pooled_forest(hidden: Tensor, forest: Forest, pooling: str) -> Tensor:
    inner = {above[-1] for above in forest.ancestors if above}
    paths = [(*above, index) for index, above in enumerate(forest.ancestors) if index not in inner]
    if pooling == "first":
        return hidden[forest.query_offsets.long()[[path[0] for path in paths]]]
    lengths = torch.tensor(forest.lengths, device=hidden.device)
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)
    sums = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add(0, segment, hidden)
    branch = torch.tensor([row for row, path in enumerate(paths) for _ in path], device=hidden.device)
    parts = torch.tensor([index for path in paths for index in path], device=hidden.device)
    totals = hidden.new_zeros(len(paths), hidden.shape[1]).index_add(0, branch, sums[parts])
    counts = torch.zeros(len(paths), dtype=lengths.dtype, device=hidden.device).index_add(0, branch, lengths[parts])
    return totals / counts[:, None].to(hidden.dtype)


def default_pooling(model: PreTrainedModel) -> str:
    """What of a text a head on this model reads."""
    named = getattr(model.config, POOLING_FIELD, None)
    if named is not None:
        return str(named)
    own = {"cls": "first", "mean": "mean"}.get(str(getattr(model.config, "classifier_pooling", None)))
    return own or ("first" if is_encoder(model) else "last")


def token_logits(model: PreTrainedModel, hidden: Tensor, batch: Batch) -> Tensor | None:
    """(R, C) logits of a head that reads one state of each branch; None where the model has no such head."""
    if not (is_classifier(model) and has_token_head(model)):
        return None
    head: Any = model.score
    logits: Tensor = head(pooled(hidden, batch, default_pooling(model)))
    return logits


def runs_own_head(model: PreTrainedModel) -> bool:
    """Is the model a classifier whose head only its own forward pass can run, as encoders are?"""
    return is_classifier(model) and not has_token_head(model)


def own_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(R, C) logits of the model's own forward pass over rows, whatever its head is made of.

    Where the mean of the tokens is asked for, it takes the place of the first token, which these heads read.
    """
    if batch.forest is not None:
        raise ForestUnsupportedError("only the model itself can run its classification head, and it reads rows")
    handle = None
    if getattr(model.config, POOLING_FIELD, None) == "mean":
        handle = model.base_model.register_forward_hook(lambda module, _, output: _with_mean_first(module, output, batch))
    try:
        logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits


def _with_mean_first(module: Any, output: Any, batch: Batch) -> Any:
    """The encoder's output with the mean over the tokens in the first slot, and what its pooler makes of that."""
    states = output.last_hidden_state
    mean = pooled(states.flatten(0, 1), batch, "mean").to(states.dtype)
    output.last_hidden_state = torch.cat([mean[:, None], states[:, 1:]], dim=1)
    if getattr(module, "pooler", None) is not None and output.get("pooler_output") is not None:
        output.pooler_output = module.pooler(output.last_hidden_state)
    return output
