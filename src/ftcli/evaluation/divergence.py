"""How far a tuned model's predictions have moved from its base's on text that both should know: KL(base || tuned) for every token.

Unlike the loss it sees a change where the right token stays as likely as it was: it is 0 only where the two predict the same.
Legend: ``M`` predicted tokens of a batch, ``V`` vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ftcli.evaluation.statistics import bootstrap_ratio
from ftcli.evaluation.tasks.columns import text_column
from ftcli.evaluation.tasks.language_modelling import TEXTS_AT_ONCE, LanguageModelling
from ftcli.evaluation.tasks.task import Figure, Subject
from ftcli.evaluation.windows import Window, in_micro_batches, windows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ftcli.data.tree import TokenTree
    from ftcli.layout.model import TreeModel


def kl_from_base(task: LanguageModelling, base: Subject, tuned: Subject) -> Figure | None:
    """Nats a token by which `tuned` predicts otherwise than `base`, with an interval over documents; never below 0.
    None where the two have different vocabularies.

    Windows are those of the task, so every token counts once.

    Raises:
        RequestError: one of them predicts with several soft prompts at once.
    """
    import numpy as np

    from ftcli.models.generate import context_length

    if base.tokenizer.backend.get_vocab() != tuned.tokenizer.backend.get_vocab():
        return None
    sizes = [context_length(subject.model.module) or 2048 for subject in (base, tuned)]
    window = min(task.window or 2048, *sizes)
    stride = min(task.stride or max(1, window // 2), window - 1)
    tokenizer = tuned.tokenizer
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    before = [first] if task.begin_token and first is not None else []
    totals, counts = array("d"), array("d")
    for part, progress in task.parts(tuned, TEXTS_AT_ONCE):
        texts = [text for text in (text_column(row, task.text, where) for where, row in part) if text]
        encoded = [[*before, *tokenizer.encode(text)[0]] for text in texts]
        sums, seen = np.zeros(len(encoded)), np.zeros(len(encoded))
        pieces = [(row, *piece) for row, tokens in enumerate(encoded) for piece in windows(len(tokens), window, stride)]
        done = 0
        for owners, divergences in _of_pieces(encoded, pieces, base, tuned):
            np.add.at(sums, owners, divergences)
            np.add.at(seen, owners, 1)
            done += len(np.unique(owners))
            progress(min(done, len(encoded)), len(encoded))
        totals.extend(sums.tolist())
        counts.extend(seen.tolist())
    sums, seen = np.array(totals), np.array(counts)
    return Figure(bootstrap_ratio(sums, seen), sums / np.maximum(seen, 1), higher_is_better=False, weights=seen)


def _of_pieces(
    encoded: Sequence[Sequence[int]], pieces: Sequence[Window], base: Subject, tuned: Subject
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """(document, divergence) of every predicted token, a micro-batch at a time."""
    import torch

    base.model.eval()
    tuned.model.eval()
    with torch.inference_mode():
        for rows, trees, weights in in_micro_batches(encoded, pieces, tuned.batch_tokens):
            examples, before = _states(base.model, trees, weights, base.tokenizer.pad_id or 0)
            _, after = _states(tuned.model, trees, weights, tuned.tokenizer.pad_id or 0)
            yield rows[examples], _divergences(base.model, before, tuned.model, after)


def _states(model: TreeModel, trees: Sequence[TokenTree], weights: Sequence[NDArray[np.float32]], pad_id: int) -> tuple[list[int], Tensor]:
    """The example of every predicted token, and ``(M, D)`` the states that predict them, in the same order in every layout."""
    from ftcli.layout.build import build_batch

    batch = build_batch(model.layout, trees, weights, pad_id).to(next(model.parameters()).device)
    return batch.example.tolist(), model.hidden_states(batch)[batch.predict_from]


def _divergences(base: TreeModel, before: Tensor, tuned: TreeModel, after: Tensor) -> NDArray[np.float64]:
    """``(M,)`` KL(base || tuned) in nats, a few tokens with the whole vocabulary at a time."""
    import numpy as np

    from ftcli.layout.model import inner_model
    from ftcli.models.head import chunk_size

    heads = [inner_model(model.module).get_output_embeddings() for model in (base, tuned)]
    vocabulary = int(inner_model(base.module).config.get_text_config().vocab_size)
    parts = []
    size = chunk_size(vocabulary, before)
    for own, others in zip(before.split(size), after.split(size), strict=True):
        log_base = base.transform(heads[0](own)).log_softmax(dim=1)
        log_tuned = tuned.transform(heads[1](others)).log_softmax(dim=1)
        common = min(log_base.shape[1], log_tuned.shape[1])  # rows that only pad the vocabulary have no probability worth counting
        pulled = log_base[:, :common].exp() * (log_base[:, :common] - log_tuned[:, :common].to(log_base.device))
        parts.append(pulled.sum(dim=1).double().cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros(0)
