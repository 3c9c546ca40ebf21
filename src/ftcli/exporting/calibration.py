"""What a model's layers see on rows of text, layer by layer, while layers before them are changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import Problem, RequestError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ftcli.exporting.source import Source

MAX_ROWS, MAX_LENGTH = 128, 512
_PROBE_ROWS = 8  # of each source: the probe has them, and what is measured is not to be learned from


def calibration_rows(source: Source, data: Path | None) -> list[list[int]]:
    """Token ids of rows of `data`, or of the data that a run was trained on.

    Raises:
        RequestError: there are none.
    """
    from ftcli.data.look import look
    from ftcli.data.settings import Data, EvaluationSource

    if data is not None:
        entry = EvaluationSource.model_validate({"source": {"kind": "file", "path": str(data)}}, strict=False)
        settings, first = Data.model_construct(train=(), evaluation=(entry,), max_length=MAX_LENGTH), 0
        looks = look(settings, source.tokenizer, MAX_ROWS)
    elif source.recipe is not None:
        settings, first = source.recipe.data, _PROBE_ROWS
        looks = look(settings, source.tokenizer, MAX_ROWS + first, source.recipe.objective.formats)
    else:
        problem = Problem(
            "--data", "is not given, and the model is no run that has data", "--data rows.jsonl, rows like those it is to read"
        )
        raise RequestError("the weights are rounded by what they do to rows of text", [problem])
    rows = []
    for found in looks:
        trees = found.trees[first:] if len(found.trees) > 2 * first else found.trees
        rows += [tree.tokens.tolist()[:MAX_LENGTH] for tree in trees]
    rows = [row for row in rows if row]
    if not rows:
        raise RequestError("there is no data", [Problem(str(data or "data"), "no row has a token")])
    return rows[:: max(1, len(rows) // MAX_ROWS)][:MAX_ROWS]


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """(name, layers) of the stack that the hidden states pass.

    Raises:
        RequestError: there is no such stack.
    """
    from torch import nn as layers

    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, layers.ModuleList) and len(module) == count:
            return name, module
    raise RequestError("the model cannot be looked at layer by layer", [Problem("config.json", f"has no stack of {count} layers")])


def layer_by_layer(model: PreTrainedModel, rows: Sequence[list[int]], change: Callable[[str, nn.Module, dict[str, Tensor]], None]) -> None:
    """Call `change(name, layer, grams)` for each layer in turn; the next one sees what the changed ones make of `rows`.

    Args:
        change: is given for each linear layer in it, by its name in the layer, ``(in, in)`` the sum of x x^T over its inputs x.
    """
    import torch

    stack_name, stack = decoder_layers(model)
    with torch.no_grad():
        hidden, rest = _calls(model, stack, rows)
        for index, layer in enumerate(stack):
            calls = [arguments[index] for arguments in rest]
            grams: dict[str, Tensor] = {}
            with _watched(layer, grams):
                for state, (positional, named) in zip(hidden, calls, strict=True):
                    layer(state, *positional, **named)
            change(f"{stack_name}.{index}", layer, grams)
            for row, (positional, named) in enumerate(calls):
                made = layer(hidden[row], *positional, **named)
                hidden[row] = made[0] if isinstance(made, tuple) else made


_Call = tuple[tuple[Any, ...], dict[str, Any]]


def _calls(model: PreTrainedModel, stack: nn.ModuleList, rows: Sequence[list[int]]) -> tuple[list[Tensor], list[list[_Call]]]:
    """(what the first layer is given for each row, for each row what else every layer is given)."""
    import torch

    hidden: list[Tensor] = []
    rest: list[list[_Call]] = []

    def note(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def noted(layer: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            others = {key: value for key, value in named.items() if key != "hidden_states"}
            if index == 0:
                hidden.append(positional[0] if positional else named["hidden_states"])
                rest.append([])
            rest[-1].append((positional[1:], others))

        return noted

    hooks = [layer.register_forward_pre_hook(note(index), with_kwargs=True) for index, layer in enumerate(stack)]
    try:
        for row in rows:
            model(input_ids=torch.tensor([row], device=model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, rest


@contextmanager
def _watched(layer: nn.Module, grams: dict[str, Tensor]) -> Iterator[None]:
    """Add up the inputs of the linear layers in `layer`, while the context is open and it runs."""
    from torch import nn as layers

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            grams[name] = grams[name].addmm_(seen.T, seen) if name in grams else seen.T @ seen

        return add

    linear = [(name, module) for name, module in layer.named_modules() if isinstance(module, layers.Linear)]
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linear]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
