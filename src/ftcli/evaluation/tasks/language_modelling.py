"""Language modelling: how well a model predicts text."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ftcli.errors import DataError, Problem
from ftcli.evaluation.rows import Rows
from ftcli.evaluation.statistics import Interval, bootstrap_ratio
from ftcli.evaluation.tasks.columns import text_column
from ftcli.evaluation.tasks.task import Figure, Progress, Subject, TaskResult, TaskSettings
from ftcli.evaluation.windows import Window, in_micro_batches, windows
from ftcli.units import perplexity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

# Documents are long: fewer of them than questions are held at once.
TEXTS_AT_ONCE = 512


class LanguageModelling(TaskSettings):
    """Loss, perplexity and bits per byte of texts; the intervals are over documents.

    A text longer than the window is read in overlapping windows: every token is predicted once, with at least `window - stride`
    tokens before it (but for the first window). Bits per byte count the text's own bytes, so that models of different vocabularies
    can be compared.
    """

    kind: Literal["language-modelling"]
    text: str = "text"
    """Column with the text."""
    window: int | None = Field(default=None, ge=2)
    """Tokens that the model sees at once; the default is its context, at most 2048."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens by which the window moves; the default is half of it. A smaller value gives every token more context, at a cost."""
    begin_token: bool = True
    """Predict the first token, too, from the begin-of-text token (the end-of-text token where there is none)."""

    kl_from_base: bool = False
    """With `--against`, also KL(base || model) in nats a token: it sees changes that leave the loss as it was. Both models are in
    memory at once."""

    main_figure: ClassVar[str] = "bits_per_byte"

    def check_rows(self, rows: Sequence[tuple[str, dict[str, Any]]], subject: Subject) -> None:
        for where, row in rows:
            text_column(row, self.text, where)

    def measure(self, subject: Subject) -> TaskResult:
        """Nats per token, perplexity and bits per byte, with bootstrap intervals over documents."""
        import numpy as np

        from ftcli.models.generate import context_length

        context = context_length(subject.model.module)
        window = min(self.window or 2048, context or self.window or 2048)
        stride = min(self.stride or max(1, window // 2), window - 1)
        tokenizer, notes = subject.tokenizer, self._cut_notes(window, stride)
        first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if self.begin_token and first is None:
            notes.append("the tokenizer has no token to begin with: first tokens are not predicted")
        before = [first] if self.begin_token and first is not None else []
        sums, rows, num_empty, num_tokens = [array("d"), array("d"), array("d")], Rows(), 0, 0
        for part, progress in self.parts(subject, TEXTS_AT_ONCE):
            texts = [(where, text_column(row, self.text, where)) for where, row in part]
            kept = [(where, text) for where, text in texts if text]
            num_empty += len(texts) - len(kept)
            encoded = [[*before, *tokenizer.encode(text)[0]] for _, text in kept]
            pieces = [(row, *piece) for row, tokens in enumerate(encoded) for piece in windows(len(tokens), window, stride)]
            nats, counts = np.zeros(len(kept)), np.zeros(len(kept))
            num_tokens += _add_losses(subject, encoded, pieces, nats, counts, progress)
            sizes = np.array([len(text.encode()) for _, text in kept], dtype=np.float64)
            for total, found in zip(sums, (nats, counts, sizes), strict=True):
                total.extend(found.tolist())
            for (where, text), nat, count, size in zip(kept, nats.tolist(), counts.tolist(), sizes.tolist(), strict=True):
                bits = nat / math.log(2) / size
                rows.append({"where": where, "text": text[:200], "loss": nat / max(count, 1), "bits_per_byte": bits})
        if num_empty:
            notes.insert(0, f"{num_empty} empty texts are left out")
        if not sums[1] or not np.array(sums[1]).any():
            raise DataError(f"task `{self.name}`", [Problem(f"column `{self.text}`", "no text has a token that can be predicted")])
        return TaskResult(_figures(*map(np.array, sums)), rows, notes, num_tokens)

    def _cut_notes(self, window: int, stride: int) -> list[str]:
        """What was asked for and cannot be had."""
        notes = []
        if self.window is not None and window < self.window:
            notes.append(f"`window` is {window} tokens, not {self.window}: the model sees no more")
        if self.stride is not None and stride < self.stride:
            notes.append(f"`stride` is {stride} tokens, not {self.stride}: it must be less than `window`, or tokens would be left out")
        return notes


def _figures(nats: Values, counts: Values, sizes: Values) -> dict[str, Figure]:
    """The figures of documents, whose nats, predicted tokens and bytes are given."""
    import numpy as np

    bits = nats / np.log(2)
    loss = bootstrap_ratio(nats, counts)
    return {
        "bits_per_byte": Figure(bootstrap_ratio(bits, sizes), bits / sizes, higher_is_better=False, weights=sizes),
        "loss": Figure(loss, nats / np.maximum(counts, 1), higher_is_better=False, weights=counts),
        "perplexity": Figure(Interval(*map(perplexity, (loss.value, loss.low, loss.high))), None, higher_is_better=False),
    }


def _add_losses(
    subject: Subject,
    encoded: Sequence[Sequence[int]],
    pieces: Sequence[Window],
    nats: Values,
    counts: Values,
    progress: Progress,
) -> int:
    """Add the loss of every window to its document's sums; tokens computed."""
    import numpy as np
    import torch

    from ftcli.layout.build import build_batch

    subject.model.eval()
    device, total, done = next(subject.model.parameters()).device, 0, 0
    with torch.inference_mode():
        for rows, trees, weights in in_micro_batches(encoded, pieces, subject.batch_tokens):
            batch = build_batch(subject.model.layout, trees, weights, subject.tokenizer.pad_id or 0)
            log_probs = subject.model(batch.to(device)).double().cpu().numpy()
            owners = rows[batch.example.cpu().numpy()]
            np.add.at(nats, owners, -log_probs)
            np.add.at(counts, owners, 1)
            total += batch.num_tokens
            done += len(trees)
            progress(done, len(pieces))
    return total
