"""Which modules of a model a recipe's patterns mean.

A pattern is the end of a module's name, in whole parts, and may hold `*`, `?` and `[...]`: `q_proj`, `mlp.*`, `layers.[01].*_proj`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ftcli.errors import Problem, RequestError, did_you_mean

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
_LISTED = 20


def matches(name: str, pattern: str) -> bool:
    """
    Example:
        >>> matches("model.layers.0.mlp.up_proj", "mlp.*"), matches("model.layers.0.mlp.up_proj", "proj")
        (True, False)
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def linear_names(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers (also quantised, also GPT-2's Conv1D), the output head left out where it is tied to the embedding.

    A low-rank change of a tied head could not be merged without changing the embedding, too.
    """
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if is_tied(model) else None
    return [name for name, module in model.named_modules() if isinstance(module, Linear | Conv1D) and module is not head]


def target_names(model: PreTrainedModel, patterns: str | Sequence[str], excluded: Collection[str] = ()) -> list[str]:
    """Names of the linear layers that get an adapter, in the model's order.

    Args:
        patterns: `all-linear` for all but the output head, or patterns.
        excluded: modules that are trained in full; what lies in them gets no adapter.

    Raises:
        RequestError: a pattern that matches no linear layer.
    """
    names = [name for name in linear_names(model) if not any(name == other or name.startswith(f"{other}.") for other in excluded)]
    if isinstance(patterns, str):
        head = model.get_output_embeddings()
        return [name for name in names if model.get_submodule(name) is not head]
    problems = [no_match("method.target_modules", pattern, names, "linear layer") for pattern in patterns if not _any(names, pattern)]
    tied_head = head_name(model) if is_tied(model) else None
    for index, pattern in enumerate(patterns):
        if tied_head is not None and matches(tied_head, pattern) and not _any(names, pattern):
            hint = f"train it in full, together with the embedding: extra_trained_modules: [{tied_head}]"
            what = f"`{pattern}` is tied to the embedding, and an adapter on it could not be merged"
            problems = [Problem(f"method.target_modules.{index}", what, hint)]
    if problems:
        raise RequestError("the method does not fit the model", problems)
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


def extra_names(model: PreTrainedModel, patterns: Sequence[str]) -> list[str]:
    """Names of the modules trained in full; the embedding and a head tied to it always come together.

    Raises:
        RequestError: a pattern that matches no module with weights of its own, or one that is quantised.
    """
    from ftcli.models.quantisation import is_quantised

    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters(recurse=False))]
    problems = [no_match("method.extra_trained_modules", pattern, names, "module") for pattern in patterns if not _any(names, pattern)]
    chosen = [name for name in names if any(matches(name, pattern) for pattern in patterns)]
    problems += [
        Problem("method.extra_trained_modules", f"`{name}` is quantised, and quantised weights cannot be trained", "use kind: lora")
        for name in chosen
        if is_quantised(model.get_submodule(name))
    ]
    if problems:
        raise RequestError("the method does not fit the model", problems)
    pair = [embedding_name(model), head_name(model)]
    if is_tied(model) and any(name in pair for name in chosen):
        chosen = [name for name in chosen if name not in pair] + [name for name in pair if name is not None]
    return chosen


def rank_of_each(names: Sequence[str], rank: int, rank_pattern: dict[str, int]) -> dict[str, int]:
    """The rank of every target: of the first pattern that matches it, else `rank`.

    Raises:
        RequestError: a pattern that matches no target.
    """
    problems = [no_match("method.rank_pattern", pattern, names, "target") for pattern in rank_pattern if not _any(names, pattern)]
    if problems:
        raise RequestError("the method does not fit the model", problems)
    return {name: next((value for pattern, value in rank_pattern.items() if matches(name, pattern)), rank) for name in names}


def shortest_suffixes(targets: Sequence[str], model: nn.Module) -> list[str]:
    """Last parts of the targets' names, if they name the targets and nothing else; else the full names."""
    last_parts = sorted({name.rpartition(".")[2] for name in targets})
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last_parts}
    return last_parts if named == set(targets) else list(targets)


def is_tied(model: PreTrainedModel) -> bool:
    """Do embedding and output head share one weight?"""
    head = model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight


def embedding_name(model: PreTrainedModel) -> str | None:
    """Name of the input embedding."""
    return _name_of(model, model.get_input_embeddings())


def head_name(model: PreTrainedModel) -> str | None:
    """Name of the output head."""
    return _name_of(model, model.get_output_embeddings())


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _any(names: Collection[str], pattern: str) -> bool:
    return any(matches(name, pattern) for name in names)


def no_match(where: str, pattern: str, names: Sequence[str], noun: str) -> Problem:
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    shown = ", ".join(endings[:_LISTED]) + (f", ... and {len(endings) - _LISTED} more" if len(endings) > _LISTED else "")
    return Problem(where, f"`{pattern}` matches no {noun} (there are: {shown})", did_you_mean(pattern, endings))
