"""A PEFT LoRA adapter as a change of its base's tensors, computed a few rows at a time: W + s B A, never a whole model.

Sources: Hu et al. 2021, arXiv:2106.09685 (LoRA); Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA: s = alpha / sqrt(r)); Liu et al. 2024,
arXiv:2402.09353 (DoRA: the rows of W + s B A brought to learnt lengths).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftcli.errors import Problem, RequestError
from ftcli.merging.documents import read_object
from ftcli.merging.layers import text_config
from ftcli.merging.numbers import STORED, Array
from ftcli.merging.pieces import row_ranges
from ftcli.merging.stored import OpenFiles, StoredTensor, read_header
from ftcli.merging.tied_head import TiedHead, are_same, tied_head, unknown_tie
from ftcli.models.adapter_start import HINT, Start, lost_start, start_factors, start_of
from ftcli.models.added_rows import needs_another_base

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_DEFAULT_ALPHA = 8  # PEFT's
_CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_NAMES = ("c_attn", "q_attn", "c_proj", "c_fc")
"""The layers of these models that are Conv1D; all others of theirs, heads among them, are linear."""
_REFUSED = {
    "target_parameters": "factors on bare parameters",
    "layer_replication": "repeated layers",
    "trainable_token_indices": "single trained rows of the embedding",
    "lora_bias": "a bias in B",
    "use_qalora": "QA-LoRA",
    "arrow_config": "Arrow routing",
    "alora_invocation_tokens": "an activated LoRA, which is on for a part of the text only",
}


@dataclass(frozen=True)
class LowRank:
    """What the adapter adds to one tensor."""

    first: StoredTensor
    """A: ``(r, in)``."""
    second: StoredTensor
    """B: ``(out, r)``."""
    scale: float
    is_transposed: bool
    """The tensor is ``(in, out)``: embeddings, and GPT-2's Conv1D."""
    magnitude: StoredTensor | None
    """DoRA's length of each output's row: ``(out,)``."""
    start: Start | None = None
    """What of the tensor itself is taken off it."""


@dataclass(frozen=True)
class Adapter:
    """An adapter, by the names of its base's tensors."""

    folder: Path
    low_rank: Mapping[str, LowRank]
    replaced: Mapping[str, StoredTensor]
    """Tensors that the adapter holds whole (PEFT's `modules_to_save`, trained biases)."""
    base: str | None
    """What its configuration says it was trained on."""
    own_head: TiedHead | None = None
    """The head that the base ties to its embedding, where the adapter makes two of them."""


def open_adapter(folder: Path, base_tensors: Mapping[str, StoredTensor], base_config: Mapping[str, Any]) -> Adapter:
    """The adapter in `folder`, matched with the tensors of its base.

    Args:
        base_config: the base's configuration, which says whether its head is its embedding.

    Raises:
        RequestError: it is not LoRA, or of a kind that no plain weights equal, or does not fit the base; names every problem.
    """
    config = read_object(folder / CONFIG_FILE, str(folder))
    problems = _refusals(folder, config) or _wrong_scales(folder, config)
    tensors = read_header(folder / WEIGHTS_FILE) if (folder / WEIGHTS_FILE).is_file() else {}
    if not tensors:
        problems.append(Problem(str(folder), f"there is no {WEIGHTS_FILE}", None))
    if problems:
        raise RequestError("an adapter cannot be merged", problems)
    tie = tied_head(base_config, base_tensors)
    base_tensors = base_tensors if tie is None else tie.apart(base_tensors)
    modules: dict[str, dict[str, StoredTensor]] = {}
    replaced: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        module, factor = _module_and_factor(name.removeprefix(_PREFIX))
        if factor is None:
            target = _matching(module, base_tensors)
            if target is None or base_tensors[target].shape != tensor.shape:
                problems.append(_no_place(folder, name, module, target, base_tensors))
            else:
                # under a tied head there is the embedding's own weight: a copy of one is a copy of both
                pair = (tie.head, tie.embedding) if tie is not None and not tie.is_stored and ".base_layer." in name else ()
                replaced.update(dict.fromkeys(pair if target in pair else (target,), tensor))
        else:
            modules.setdefault(module, {})[factor] = tensor
    low_rank = {}
    for module, factors in modules.items():
        target = _matching(f"{module}.weight", base_tensors)
        problem = _no_place(folder, module, f"{module}.weight", None, base_tensors) if target is None else None
        if target is not None:
            change, problem = _low_rank(config, base_config, folder, module, factors, base_tensors[target])
            if change is not None:
                # the weight that PEFT stores beside the factors of a head is less its start already
                low_rank[target] = replace(change, start=None) if target in replaced else change
        if problem is not None:
            problems.append(problem)
    if (tied := unknown_tie(base_config, base_tensors, (*low_rank, *replaced))) is not None:
        what = f"it changes `{tied}`, to which the base ties its head, and how the head would be called apart is not known"
        problems.append(Problem(str(folder), what, "save the base with `tie_word_embeddings: false` and a head of its own"))
    if problems:
        raise RequestError("an adapter does not fit its base", problems)
    noted = config.get("base_model_name_or_path")
    own_head = None
    if tie is not None and _stays_tied(tie, bool(config.get("ensure_weight_tying")), low_rank, replaced):
        _follow(tie, low_rank)
        _follow(tie, replaced)
    else:
        own_head = tie
    return Adapter(folder, low_rank, replaced, noted if isinstance(noted, str) else None, own_head)


def _follow(tie: TiedHead, changes: dict[str, Any]) -> None:
    """Give a head that is still the embedding the embedding's change, where the base's file has a tensor for it."""
    changes.pop(tie.head, None)
    if tie.is_stored and tie.embedding in changes:
        changes[tie.head] = changes[tie.embedding]


def _stays_tied(tie: TiedHead, is_tied_by_peft: bool, low_rank: Mapping[str, LowRank], replaced: Mapping[str, StoredTensor]) -> bool:
    """True when the adapter leaves head and embedding one tensor: both untouched, both replaced by the same, or tied by PEFT."""
    if tie.head in low_rank or tie.embedding in low_rank:
        return is_tied_by_peft and tie.embedding in low_rank
    head, embedding = replaced.get(tie.head), replaced.get(tie.embedding)
    if head is None or embedding is None:
        return head is embedding or (is_tied_by_peft and embedding is not None)
    return head is embedding or are_same(head, embedding)


def _wrong_scales(folder: Path, config: Mapping[str, Any]) -> list[Problem]:
    return [Problem(str(folder), what, "PEFT writes numbers here: fetch or write the file again") for what in wrong_scales(config)]


def wrong_scales(config: Mapping[str, Any]) -> Iterator[str]:
    """What an adapter's configuration says of its scale that is no number, in words."""
    numbers = {"lora_alpha": config.get("lora_alpha", _DEFAULT_ALPHA), "r": config.get("r", 1)}
    for key in ("alpha_pattern", "rank_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            yield f"`{key}` is {patterns}, allowed: a mapping from modules to numbers"
            continue
        numbers |= {f"{key}.{pattern}": value for pattern, value in patterns.items()}
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"`{key}`: `{pattern}` is no regular expression: {error}"
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            yield f"`{name}` is {json.dumps(value)}, allowed: a number"


def _refusals(folder: Path, config: Mapping[str, Any]) -> list[Problem]:
    kind = config.get("peft_type")
    if kind != "LORA":
        hint = "merge it with `ftcli merge --base BASE --adapter DIR`" if kind else None
        return [Problem(str(folder), f"the adapter is of kind {kind}; only LORA becomes plain weights tensor by tensor", hint)]
    if (needed := needs_another_base(folder)) is not None:
        return [Problem(str(folder), needed, "`ftcli merge` of its run makes a model, which can be merged with others")]
    if (lost := lost_start(config)) is not None:
        return [Problem(str(folder), lost, HINT)]
    return [
        Problem(str(folder), f"`{key}`: {what} cannot be folded into plain weights", None)
        for key, what in _REFUSED.items()
        if config.get(key)
    ]


def _module_and_factor(name: str) -> tuple[str, str | None]:
    """A key's module, and which factor of it; None for a tensor that is there whole.

    Example:
        >>> _module_and_factor("model.layers.0.q_proj.lora_A.weight"), _module_and_factor("model.norm.modules_to_save.weight")
        (('model.layers.0.q_proj', 'lora_A'), ('model.norm.weight', None))
    """
    stem = name.removesuffix(".weight")
    module, _, last = stem.rpartition(".")
    if last in _FACTORS:
        return module, last
    return re.sub(r"\.(modules_to_save|original_module|base_layer)(\.default)?(?=\.)", "", name), None


def _matching(name: str, base_tensors: Mapping[str, StoredTensor]) -> str | None:
    """The base's tensor of that name, or the only one whose name is the end of it, or ends in it."""
    if name in base_tensors:
        return name
    near = [other for other in base_tensors if name.endswith(f".{other}") or other.endswith(f".{name}")]
    return near[0] if len(near) == 1 else None


def _no_place(folder: Path, name: str, module: str, target: str | None, base_tensors: Mapping[str, StoredTensor]) -> Problem:
    if target is not None:
        return Problem(str(folder), f"`{name}` has another shape than the base's {list(base_tensors[target].shape)}", None)
    hint = "the base ties its head to the embedding, and one tensor cannot be both" if "lm_head" in name else None
    return Problem(str(folder), f"`{name}` belongs to no tensor of the base (`{module}`)", hint)


def _low_rank(
    config: Mapping[str, Any],
    base_config: Mapping[str, Any],
    folder: Path,
    module: str,
    factors: Mapping[str, StoredTensor],
    weight: StoredTensor,
) -> tuple[LowRank | None, Problem | None]:
    is_embedding = "lora_embedding_A" in factors
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    if any(name not in factors for name in names):
        return None, Problem(str(folder), f"`{module}` has only {', '.join(factors)}", None)
    first, second = (factors[name] for name in names)
    if odd := [factor.dtype for factor in factors.values() if factor.dtype not in STORED]:
        return None, Problem(str(folder), f"the factors of `{module}` are stored as {odd[0]}, which cannot be computed with", None)
    if len(first.shape) != 2 or len(second.shape) != 2 or first.shape[0] != second.shape[1] or first.shape[0] == 0:
        what = f"`{module}`: A is {list(first.shape)} and B {list(second.shape)}, allowed: [r, in] and [out, r]"
        return None, Problem(str(folder), what, None)
    magnitude = factors.get("lora_magnitude_vector")
    if magnitude is not None and magnitude.size != second.shape[0]:
        return None, Problem(str(folder), f"`{module}`: {magnitude.size} lengths for the {second.shape[0]} rows of B", None)
    if is_embedding and magnitude is not None:
        return None, Problem(str(folder), f"`{module}`: DoRA on an embedding cannot be folded in by rows", None)
    expected = (second.shape[0], first.shape[-1])
    is_transposed = is_embedding or is_stored_transposed(config, base_config, module, weight.shape, expected)
    found = weight.shape[::-1] if is_transposed else weight.shape
    if len(weight.shape) != 2 or found != expected:
        return None, Problem(str(folder), f"`{module}`: B A is {list(expected)}, the base's weight {list(weight.shape)}", None)
    scale = scaling(config, module, first.shape[0])
    return LowRank(first, second, scale, is_transposed, magnitude, None if is_embedding else start_of(config)), None


def is_stored_transposed(
    config: Mapping[str, Any], base_config: Mapping[str, Any], module: str, shape: tuple[int, ...], expected: tuple[int, int]
) -> bool:
    """Does the base store a linear layer's weight as (in, out)? By its architecture; where that has none of these layers by its shape.

    PEFT's note of it, one `fan_in_fan_out` for all layers, is true of the one it came to last; a square weight leaves nothing else.

    Args:
        shape: of the base's weight.
        expected: (out, in) by the factors.
    """
    is_conv1d = module.rpartition(".")[2] in _CONV1D_NAMES
    if text_config(base_config).get("model_type") in _CONV1D_TYPES:
        return is_conv1d
    is_noted = bool(config.get("fan_in_fan_out"))
    return is_noted if expected[0] == expected[1] else shape == expected[::-1] and (is_noted or is_conv1d)


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """s of a module: alpha / r, or alpha / sqrt(r) for rsLoRA, each by its pattern.

    Args:
        rank: of its factors; PEFT divides by the one that was asked for, of which a start taken from a small weight has not all.
    """
    noted = _pattern(config.get("rank_pattern"), module, config.get("r"))
    rank = max(rank, noted) if isinstance(noted, int) else rank
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", _DEFAULT_ALPHA))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: a key is a regular expression for the end of the module's name."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


class LowRankChange:
    """A `LowRank` with its factors in memory: rows of the changed weight from rows of the base's."""

    def __init__(self, change: LowRank, files: OpenFiles) -> None:
        self._change = change
        first = files.whole(change.first)
        second = files.whole(change.second) * np.float32(change.scale)
        self._left: Array = np.ascontiguousarray(first.T) if change.is_transposed else second
        self._right: Array = second.T if change.is_transposed else first
        self._magnitude = None if change.magnitude is None else files.whole(change.magnitude).reshape(-1)
        self._is_transposed = change.is_transposed
        self._lengths: NDArray[np.float64] | None = None

    def rows(self, base: Array, first: int) -> Array:
        """The changed rows.

        Args:
            base: ``(rows, columns)``.
            first: index of the first of them.
        """
        changed: Array = base + self._left[first : first + len(base)] @ self._right
        if self._magnitude is None:
            return changed
        if self._is_transposed:
            assert self._lengths is not None, "the lengths of columns are measured first"
            by_column: Array = changed * (self._magnitude / self._lengths).astype(np.float32)
            return by_column
        lengths = np.sqrt(np.einsum("rc,rc->r", changed, changed, dtype=np.float64))
        ratio = self._magnitude[first : first + len(base)] / lengths
        by_row: Array = changed * ratio[:, None].astype(np.float32)
        return by_row

    def measure(self, weight: StoredTensor, files: OpenFiles) -> None:
        """Read the whole weight once where a part of it is taken off, or where rows that have learnt lengths are stored as columns."""
        change = self._change
        if change.start is not None:
            left, right = start_factors(change.start, files.whole(weight), change.first.shape[0], change.scale)
            self._left, self._right = np.concatenate([self._left, -left], axis=1), np.concatenate([self._right, right])
        if self._magnitude is None or not self._is_transposed:
            return
        rows, columns = weight.shape
        squares = np.zeros(columns)
        for first, last in row_ranges(rows, columns):
            base = files.numbers(weight, first * columns, (last - first) * columns).reshape(-1, columns)
            changed = base + self._left[first:last] @ self._right
            squares += np.einsum("rc,rc->c", changed, changed, dtype=np.float64)
        self._lengths = np.sqrt(squares)
