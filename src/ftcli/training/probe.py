"""probe.json: a few rows, prompts and a conversation, and what the trained model made of them, so that it can be asked again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import FtcliError, RunError
from ftcli.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

    from ftcli.data.store import TreeStore
    from ftcli.data.tree import TokenTree
    from ftcli.layout.model import TreeModel
    from ftcli.models.generate import Answer
    from ftcli.models.tokenizer import Tokenizer
    from ftcli.objectives import Objective

PROBE = "probe.json"
MEASURED_ROWS = 4
"""Of each evaluation source."""
CONVERSATION = (
    {"role": "user", "content": "How many apples are left?"},
    {"role": "assistant", "content": "Five."},
    {"role": "user", "content": "And pears?"},
)


def note_before(folder: Path, log_probs: Tensor) -> None:
    """Write down what the model made of the probe's rows before the first step."""
    write_text(folder / PROBE, json.dumps({"before": log_probs.tolist()}))


def change_between(before: Tensor, after: Tensor) -> dict[str, float]:
    """How far training moved the probe's log-probabilities: mean and largest absolute difference, in nats."""
    moved = (after - before).abs()
    return {"mean": float(moved.mean()), "largest": float(moved.max())}


def tree_json(tree: TokenTree) -> dict[str, list[int]]:
    """The tokens of a tree and where they stand in it."""
    return {"tokens": tree.tokens.tolist(), "starts": tree.starts.tolist(), "parents": tree.parents.tolist()}


def tree_of(value: Mapping[str, Any]) -> TokenTree:
    """The tree that `tree_json` wrote down; no token of it is a target.

    Raises:
        RunError: it is none.
    """
    import numpy as np

    from ftcli.data.tree import SPAN, TokenTree

    try:
        columns = [np.array(value[name], dtype=np.int32) for name in ("tokens", "starts", "parents")]
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"`{PROBE}` holds a row that is no row: {error}") from error
    return TokenTree(columns[0], columns[1], columns[2], np.zeros(0, dtype=SPAN), 0, 0)


def measured_losses(
    model: TreeModel, objective: Objective, stores: Sequence[TreeStore], pad_id: int, rows: int = MEASURED_ROWS
) -> dict[str, float]:
    """The loss of the first rows of each evaluation source, in nats per target, in the rows layout."""
    import torch

    from ftcli.layout.build import build_posed

    layout, was_training, found = model.layout, model.training, {}
    model.eval()
    model.use_layout("rows")
    try:
        for store in stores:
            posed = [objective.pose(store.tree(index), is_measured=True) for index in range(min(rows, len(store)))]
            with torch.inference_mode():
                batch = build_posed("rows", posed, pad_id).to(next(model.parameters()).device)
                losses = objective.losses(model(batch).double(), batch)
                found[store.name] = float((losses.values * losses.weights).sum() / losses.weights.sum())
    finally:
        model.use_layout(layout)
        model.train(was_training)
    return found


def rendered_conversation(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """A fixed conversation as the template writes it, and its tokens; None without a template, or where it refuses."""
    if tokenizer.chat_template is None:
        return None
    try:
        text = tokenizer.render(CONVERSATION, add_generation_prompt=True)
    except FtcliError:
        return None
    return {"text": text, "tokens": tokenizer.encode(text)[0]}


def write_probe(
    folder: Path,
    *,
    trees: Sequence[TokenTree],
    log_probs: Tensor,
    losses: Mapping[str, float],
    conversation: Mapping[str, Any] | None,
    answers: Sequence[Answer],
    prompts: Sequence[str],
    max_new_tokens: int,
) -> dict[str, float] | None:
    """Write down what the trained model made of the probe.

    Returns:
        How far training moved the model; None where it is not known what it was before.
    """
    try:
        before = json.loads((folder / PROBE).read_text(encoding="utf-8"))["before"]
    except (OSError, ValueError, KeyError):
        before = None
    asked = [{"prompt": prompt, "answer": answer.text, "stopped": answer.stopped} for prompt, answer in zip(prompts, answers, strict=True)]
    values = {
        "rows": [tree_json(tree) for tree in trees],
        "before": before,
        "log_probs": log_probs.tolist(),
        "losses": dict(losses),
        "conversation": conversation,
        "answers": asked,
        "max_new_tokens": max_new_tokens,
    }
    write_text(folder / PROBE, json.dumps(values, ensure_ascii=False) + "\n")
    return None if before is None else change_between(log_probs.new_tensor(before), log_probs)


def read_probe(folder: Path) -> dict[str, Any]:
    """What `write_probe` wrote.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    try:
        found = json.loads((folder / PROBE).read_text(encoding="utf-8"))
        return {**found, "rows": list(found["rows"]), "log_probs": list(found["log_probs"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"`{PROBE}` cannot be read: {error}") from error
