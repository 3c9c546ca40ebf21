"""Log-likelihoods of continuations: what multiple choice, label words and preferences are decided by.

A row is a tree: its context once, and a branch for every choice. What all rows have in common - the few-shot prefix - is computed
once for the whole set, and its keys and values stand before every tree. Tokens are those of the context and the choice encoded
together, split where the context alone ends, with spaces at the context's end moved to the choice, and BOS before the context where the
tokenizer puts one before a text: so are lm-evaluation-harness's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ftcli.data.tree import SPAN, TokenTree

if TYPE_CHECKING:
    from torch import Tensor

    from ftcli.layout.batch import Batch
    from ftcli.layout.model import TreeModel
    from ftcli.layout.virtual import VirtualTokens
    from ftcli.models.tokenizer import Tokenizer

# A shorter common beginning is not worth a forward pass of its own.
MIN_SHARED_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Continuations:
    """A context and what may follow it."""

    context: str
    choices: tuple[str, ...]
    where: str = "choices"
    """The row that they are of, for errors."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of one choice after its context."""

    log_prob: float
    """Nats, summed over the choice's tokens."""
    num_tokens: int
    is_greedy: bool | None = None
    """Every token is the likeliest one; None where it was not asked for."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What was computed, and at what cost."""

    likelihoods: list[list[Likelihood]]
    """In the order of the rows and their choices."""
    num_tokens: int
    """Tokens that went through the model."""
    num_tokens_apart: int
    """Tokens that one pass a choice would have taken."""
    num_cut: int
    """Rows whose context lost its beginning, because the model cannot see so far back."""


@dataclass(frozen=True, slots=True)
class _Encoded:
    context: list[int]
    choices: list[list[int]]
    is_cut: bool

    def __len__(self) -> int:
        return len(self.context) + sum(map(len, self.choices))


def score_continuations(
    model: TreeModel,
    tokenizer: Tokenizer,
    rows: Sequence[Continuations],
    *,
    with_greedy: bool = False,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scored:
    """The log-likelihood of every choice of every row.

    Args:
        model: in the layout that fits it; it is left in evaluation mode.
        with_greedy: also say whether greedy decoding would give the choice.
        batch_tokens: tokens of one forward pass.

    Raises:
        RequestError: a choice alone is longer than the model's context.
    """
    import torch

    from ftcli.layout.virtual import soft_prompt_members
    from ftcli.models.generate import context_length

    limit = context_length(model.module)
    encoded = [_encode(tokenizer, row, limit) for row in rows]
    model.eval()
    with torch.inference_mode():
        shared = 0 if soft_prompt_members(model.module) else _shared_beginning(encoded)
        prefix = compute_prefix(model, encoded[0].context[:shared]) if shared else None
        shared = shared if prefix is not None else 0
        found: list[list[Likelihood]] = [[] for _ in rows]
        order = sorted(range(len(rows)), key=lambda index: -len(encoded[index]))
        done, num_tokens = 0, shared
        for part in _parts(order, [len(one) - shared for one in encoded], batch_tokens):
            trees = [_tree(encoded[index], shared) for index in part]
            num_tokens += sum(map(len, trees))
            for index, likelihoods in zip(part, _score(model, trees, prefix, tokenizer.pad_id or 0, with_greedy), strict=True):
                found[index] = likelihoods
            done += len(part)
            progress(done, len(rows))
    apart = sum(len(one.context) + len(choice) for one in encoded for choice in one.choices)
    return Scored(found, num_tokens, apart, sum(one.is_cut for one in encoded))


def check_continuations(model: TreeModel, tokenizer: Tokenizer, rows: Sequence[Continuations]) -> None:
    """Nothing, if `score_continuations` can compute these.

    Raises:
        RequestError: a choice is empty, or alone longer than the model's context; names its row.
    """
    from ftcli.models.generate import context_length

    limit = context_length(model.module)
    for row in rows:
        _encode(tokenizer, row, limit)


def split_context(context: str, choice: str) -> tuple[str, str]:
    """The same text with spaces at the context's end given to the choice, whose first token they are part of.

    Example:
        >>> split_context("Answer: ", "yes")
        ('Answer:', ' yes')
    """
    bare = context.rstrip()
    return (bare, context[len(bare) :] + choice) if bare else (context, choice)


def _encode(tokenizer: Tokenizer, row: Continuations, limit: int | None) -> _Encoded:
    """Tokens of the context and of each choice; of a context that is too long the end. The context begins as the tokenizer begins a
    text, unless it does already; one without tokens begins with BOS or EOS in any case, so that there is something to predict from."""
    from ftcli.errors import Problem, RequestError

    bare = split_context(row.context, "")[0]
    context = tokenizer.encode(bare)[0] if bare.strip() else []
    choices = [tokenizer.encode("".join(split_context(row.context, choice)))[0][len(context) :] for choice in row.choices]
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if first is not None and context[:1] != [first] and (tokenizer.adds_bos or not context):
        context = [first, *context]
    longest = max(map(len, choices), default=0)
    if any(not choice for choice in choices):
        raise RequestError("a choice is empty", [Problem(row.where, f"{row.choices!r} after {bare[-40:]!r}", "every choice needs a token")])
    if limit is None or len(context) + longest <= limit:
        return _Encoded(context, choices, is_cut=False)
    if longest >= limit:
        raise RequestError("a choice does not fit", [Problem(row.where, f"{longest} tokens, the model sees {limit}", None)])
    return _Encoded(context[len(context) + longest - limit :], choices, is_cut=True)


def _shared_beginning(encoded: Sequence[_Encoded]) -> int:
    """How many first tokens all contexts have in common, at least one of each left out; 0 where it is not worth it."""
    if len(encoded) < 2:
        return 0
    shortest = min(len(one.context) for one in encoded) - 1
    if shortest < MIN_SHARED_TOKENS:
        return 0
    table = np.array([one.context[:shortest] for one in encoded])
    differs = np.flatnonzero((table != table[0]).any(axis=0))
    shared = int(differs[0]) if len(differs) else shortest
    return shared if shared >= MIN_SHARED_TOKENS else 0


def _parts(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """`order` cut into parts of at most `budget` tokens, one row at least."""
    parts: list[list[int]] = []
    room = 0
    for index in order:
        if not parts or lengths[index] > room:
            parts.append([])
            room = budget
        parts[-1].append(index)
        room -= lengths[index]
    return parts


def _tree(encoded: _Encoded, shared: int) -> TokenTree:
    """The context after what is shared, and the choices as its branches."""
    context = encoded.context[shared:]
    lengths = [len(context), *map(len, encoded.choices)]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int32)
    parents = np.array([-1, *[0] * len(encoded.choices)], dtype=np.int32)
    tokens = np.array([*context, *(token for choice in encoded.choices for token in choice)], dtype=np.int32)
    return TokenTree(tokens, starts, parents, np.zeros(0, dtype=SPAN), 0, 0)


def compute_prefix(model: TreeModel, tokens: Sequence[int]) -> VirtualTokens | None:
    """Keys and values of every layer for tokens that stand before all trees; None where a layer does not keep them all."""
    import torch

    from ftcli.layout.model import inner_model
    from ftcli.layout.virtual import VirtualTokens

    layout = model.layout
    model.use_layout("rows")
    try:
        decoder = inner_model(model.module).base_model
        ids = torch.tensor([list(tokens)], device=next(model.parameters()).device)
        cache = decoder(input_ids=ids, use_cache=True).past_key_values
    finally:
        model.use_layout(layout)
    pairs = tuple((layer.keys, layer.values) for layer in getattr(cache, "layers", ()))
    is_whole = bool(pairs) and all(keys is not None and keys.shape[2] == len(tokens) for keys, _ in pairs)
    return VirtualTokens(None, pairs) if is_whole else None


def _score(
    model: TreeModel, trees: Sequence[TokenTree], prefix: VirtualTokens | None, pad_id: int, with_greedy: bool
) -> list[list[Likelihood]]:
    """The likelihoods of each tree's branches."""
    import torch

    from ftcli.layout.build import build_batch

    weights = [(np.arange(len(tree)) >= tree.starts[1]).astype(np.float32) for tree in trees]
    batch = build_batch(model.layout, trees, weights, pad_id).to(next(model.parameters()).device)
    log_probs, misses = _with_misses(model, batch, prefix) if with_greedy else (model.log_probs_after(batch, prefix), None)
    log_probs, count = log_probs.double(), len(batch.readout)
    nothing = torch.zeros(count, dtype=torch.float64, device=log_probs.device)
    sums = nothing.index_add(0, batch.branch, log_probs).tolist()
    sizes = torch.bincount(batch.branch, minlength=count).tolist()
    greedy = [None] * count if misses is None else (nothing.index_add(0, batch.branch, misses.double()) == 0).tolist()
    likelihoods = iter([Likelihood(*one) for one in zip(sums, sizes, greedy, strict=True)])
    return [[next(likelihoods) for _ in range(len(tree.starts) - 1)] for tree in trees]


def _with_misses(model: TreeModel, batch: Batch, prefix: VirtualTokens | None) -> tuple[Tensor, Tensor]:
    """(M,) log-probability of each target, and whether another token is likelier."""
    import torch

    from ftcli.layout.model import inner_model
    from ftcli.models.head import chunk_size

    hidden = model.hidden_states(batch) if prefix is None else model.hidden_states_after(batch, prefix)
    head = inner_model(model.module).get_output_embeddings()
    states, found, misses = hidden[batch.predict_from], [], []
    size = chunk_size(int(getattr(head, "out_features", 0)) or 2**15, states)
    for part, targets in zip(states.split(size), batch.targets.split(size), strict=True):
        logits = model.transform(head(part))
        found.append(logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=1))
        misses.append(logits.argmax(dim=1) != targets)
    return torch.cat(found), torch.cat(misses)
