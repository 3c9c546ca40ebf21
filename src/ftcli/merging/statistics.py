"""What `fisher` and `regmean` need to know of a model, gathered on data: a safetensors file with tensors of the weights' names.

Sources: Matena and Raffel 2022, arXiv:2111.09832 (Fisher); Jin et al. 2023, arXiv:2212.09849 (RegMean).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ftcli.errors import Problem, RequestError, UsageError
from ftcli.files import check_place
from ftcli.merging.lora.stored import name_in_checkpoint
from ftcli.merging.search.judge import MergedModel, load_frame
from ftcli.merging.sources import Source, open_source

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ftcli.data.store import TreeStore
    from ftcli.layout.batch import Batch
    from ftcli.layout.model import TreeModel
    from ftcli.models.tokenizer import Tokenizer
    from ftcli.objectives.causal_lm import CausalLM

Kind = Literal["fisher", "regmean"]
KINDS: tuple[Kind, ...] = ("fisher", "regmean")
Say = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Gathered:
    """Statistics that were written."""

    output: Path
    kind: Kind
    num_examples: int
    num_tokens: int
    num_tensors: int

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "kind": self.kind,
            "examples": self.num_examples,
            "tokens": self.num_tokens,
            "tensors": self.num_tensors,
        }


def gather_statistics(
    model: str,
    output: Path,
    kind: Kind,
    *,
    data: Path | None = None,
    recipe: Path | None = None,
    num_examples: int = 256,
    max_length: int = 1024,
    seed: int = 0,
    device: str = "auto",
    say: Say = lambda done, total, what: None,
) -> Gathered:
    """Write the statistics of a model at `output`.

    They are sums over examples, so that a model whose statistics come from more data counts more: gather as many from each.

    Args:
        model: as a merge recipe names it.
        data: a file of rows; or
        recipe: a recipe of `ftcli train`, whose training data is read.
        num_examples: so many, drawn at random, or all where there are fewer.
        max_length: longest example of `data` in tokens; a recipe has its own.

    Raises:
        RequestError: the model or its data cannot be had.
        UsageError: something is at `output` already.
    """
    check_place(output)
    if output.exists():
        raise UsageError(f"`{output}` exists already", hint="choose another file for the statistics, or remove this one")
    source = open_source(model, Path.cwd())
    module, tokenizer = load_frame(source, device)
    # an adapter's change is in what is merged, and so in what is measured
    MergedModel(module, [source], None).fill_with(0)
    stores, objective = _opened(data, recipe, max_length, tokenizer)
    batches = list(_batches(stores, objective, num_examples, seed, tokenizer))
    if not batches:
        raise RequestError("there is no data", [Problem(str(data or recipe), "no example has a target", None)])
    found = _gathered(kind, source, module, objective, batches, say)
    metadata = {"format": "pt", "kind": kind, "examples": str(len(batches)), "seed": str(seed), "model": model}
    _write(output, found, metadata)
    return Gathered(output, kind, len(batches), sum(batch.num_tokens for batch in batches), len(found))


def _opened(data: Path | None, recipe: Path | None, max_length: int, tokenizer: Tokenizer) -> tuple[Sequence[TreeStore], CausalLM]:
    """The rows, tokenised, and the objective whose gradients are meant."""
    from ftcli.data.prepare import prepare
    from ftcli.data.settings import Data, EvaluationSource
    from ftcli.objectives.causal_lm import CausalLM
    from ftcli.recipe.load import load_recipe
    from ftcli.training.assemble import cache_folder

    if recipe is not None:
        loaded = load_recipe(recipe).recipe
        if not isinstance(loaded.objective, CausalLM):
            problem = Problem("objective.kind", f"found `{loaded.objective.kind}`, allowed: causal-lm", None)
            raise RequestError("statistics are gathered on what is to be said next", [problem])
        return prepare(loaded.data, tokenizer, cache_folder=cache_folder()).train, loaded.objective
    entry = EvaluationSource.model_validate({"source": {"kind": "file", "path": str(data)}}, strict=False)
    settings = Data.model_construct(train=(), evaluation=(entry,), max_length=max_length)
    return prepare(settings, tokenizer, cache_folder=cache_folder()).evaluation, CausalLM()


def _batches(stores: Sequence[TreeStore], objective: CausalLM, num_examples: int, seed: int, tokenizer: Tokenizer) -> Iterator[Batch]:
    """One example each."""
    from ftcli.layout.build import build_posed

    places = [(store, index) for store in stores for index in range(len(store))]
    for position in np.random.default_rng(seed).permutation(len(places))[:num_examples].tolist():
        store, index = places[position]
        posed = objective.pose(store.tree(index))
        if posed.num_targets:
            yield build_posed("rows", [posed], tokenizer.pad_id or 0)


def _gathered(kind: Kind, source: Source, module: nn.Module, objective: CausalLM, batches: Sequence[Batch], say: Say) -> dict[str, Tensor]:
    from ftcli.layout.model import TreeModel

    model = TreeModel(module, "rows")
    model.eval()
    device = next(module.parameters()).device
    moved = (batch.to(device) for batch in batches)
    total = len(batches)
    if kind == "fisher":
        found = fisher_diagonal(model, objective, _told(moved, total, say))
    else:
        found = input_grams(model, _told(moved, total, say))
    named = {str(name_in_checkpoint(source.tensors, name)): value for name, value in found.items()}
    bad = [name for name, value in named.items() if not bool(value.isfinite().all())]
    if bad:
        raise RequestError("the statistics are not finite", [Problem(name, "NaN or infinite", None) for name in bad[:5]])
    return named


def _told(batches: Iterator[Batch], total: int, say: Say) -> Iterator[Batch]:
    for index, batch in enumerate(batches):
        yield batch
        say(index + 1, total, "gather statistics")


def fisher_diagonal(model: TreeModel, objective: CausalLM, batches: Iterator[Batch]) -> dict[str, Tensor]:
    """For each parameter the squared gradients of each example's log-likelihood, summed: the empirical Fisher diagonal.

    Args:
        batches: one example each.
    """
    import torch

    parameters = dict(model.module.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for batch in batches:
        losses = objective.losses(model(batch), batch)
        gradients = torch.autograd.grad((losses.values * losses.weights).sum(), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name].addcmul_(gradient, gradient)
    return total


def input_grams(model: TreeModel, batches: Iterator[Batch]) -> dict[str, Tensor]:
    """For the weight of each linear layer ``(in, in)`` X^T X of the inputs of all tokens; padding is none.

    Heads are no such layers: only the hidden states of targets reach them.
    """
    import torch

    grams: dict[str, Tensor] = {}
    for batch in batches:
        with _inputs_seen(model.module, batch, grams), torch.no_grad():
            model(batch)
    return grams


def _inputs_seen(module: nn.Module, batch: Batch, grams: dict[str, Tensor]) -> AbstractContextManager[None]:
    """Adds to `grams` while the context is open and the model runs over `batch`."""
    import torch
    from torch import nn as layers

    num_slots = batch.input_ids.numel()
    is_token = torch.ones(num_slots, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask.reshape(-1).bool()

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].reshape(-1, inputs[0].shape[-1])
            if seen.shape[0] != num_slots:
                return  # a head, which sees targets only
            seen = seen[is_token.to(seen.device)].float()
            grams[name] = grams[name].addmm_(seen.T, seen) if name in grams else seen.T @ seen

        return add

    @contextmanager
    def opened() -> Iterator[None]:
        own = {name for name, _ in module.named_parameters()}
        watched = [(f"{name}.weight", layer) for name, layer in module.named_modules() if isinstance(layer, layers.Linear)]
        hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in watched if name in own]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    return opened()


def _write(output: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """The file, which appears only when it is whole."""
    from safetensors.torch import save_file

    from ftcli.files import said_when_disk_is_full

    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".writing-{output.name}")
    with said_when_disk_is_full(output.parent):
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, str(partial), metadata)
        partial.replace(output)
