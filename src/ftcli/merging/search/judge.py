"""A model whose weights are swapped in place for each merge that is tried: loaded once, measured many times, nothing written.

Parameters are merged by the same functions that write merges to disk, in float32, from the models' files (kept in memory where they
are small). What is measured is what `ftcli train` measures on an evaluation source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ftcli.errors import Problem, RequestError
from ftcli.merging.layers import is_before_layers, is_tied, num_layers
from ftcli.merging.lora.stored import name_in_checkpoint
from ftcli.merging.methods.method import MergeMethod
from ftcli.merging.numbers import Array
from ftcli.merging.pieces import ArrayInputs, rows_and_columns
from ftcli.merging.randomness import Randomness, plain_name
from ftcli.merging.readers import open_reader
from ftcli.merging.search.log import Scores
from ftcli.merging.search.recipe import Evaluate
from ftcli.merging.sources import Source
from ftcli.merging.stored import OpenFiles

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ftcli.data.settings import Data, EvaluationSource
    from ftcli.data.store import TreeStore
    from ftcli.evaluation.answers import Question
    from ftcli.layout.model import TreeModel
    from ftcli.models.tokenizer import Tokenizer

KEPT_BYTES = 2**31
"""Models that take less as float32, all together, are read once and kept."""
_LOSSES = ("loss", "perplexity", "bits_per_byte")
_PROBE_TREES = 4


@dataclass
class MergedModel:
    """A model to be filled with merges of `sources`."""

    module: PreTrainedModel
    sources: Sequence[Source]
    base: Source | None
    num_groups: int = 1
    _kept: dict[tuple[int, str], Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = num_layers(self._all[0].config) or 1
        self._num_layers = count
        size = sum(parameter.numel() for parameter in self.module.parameters())
        self._keeps = 4 * size * len(self._all) <= KEPT_BYTES
        problems = [problem for name, parameter in self.module.named_parameters() for problem in self._unfit(name, tuple(parameter.shape))]
        problems += self._parted()
        if problems:
            raise RequestError("the models cannot be merged in memory", problems[:5])

    @property
    def _all(self) -> list[Source]:
        return [*self.sources, *([] if self.base is None else [self.base])]

    def _unfit(self, name: str, shape: tuple[int, ...]) -> list[Problem]:
        found = []
        for source in self._all:
            stored = name_in_checkpoint(source.tensors, name)
            if stored is None:
                found.append(Problem(source.reference, f"has no `{name}`", "models of one architecture"))
            elif source.tensor(stored).shape != shape:
                what = f"`{name}` has shape {source.tensor(stored).shape}, expected {shape}"
                found.append(Problem(source.reference, what, "merge them once with a `tokenizer` section first"))
        return found

    def _parted(self) -> list[Problem]:
        """Models with a head of their own cannot be put into one whose head is its embedding."""
        head = self.module.get_output_embeddings()
        if head is None or head.weight is not self.module.get_input_embeddings().weight:
            return []
        what, hint = "has a head of its own, and the first model's is its embedding", "models that all tie their head, or none"
        return [Problem(source.reference, what, hint) for source in self._all if is_tied(source.config) is False]

    def group_of(self, name: str) -> int:
        """The group of layers a parameter is in: embeddings in the first, what comes behind the layers in the last."""
        parts = [part for part in name.split(".") if part.isdecimal()]
        if parts:
            return int(parts[0]) * self.num_groups // self._num_layers
        return 0 if is_before_layers(name) else self.num_groups - 1

    def array(self, index: int, name: str) -> Array:
        """A parameter of one model; index -1 is the base."""
        key = (index, name)
        if key in self._kept:
            return self._kept[key]
        source = self.base if index < 0 else self.sources[index]
        assert source is not None
        stored = str(name_in_checkpoint(source.tensors, name))
        shape = source.tensor(stored).shape
        with OpenFiles() as files:
            found = open_reader(source, stored, files).rows(0, rows_and_columns(shape)[0]).reshape(shape)
        if self._keeps:
            self._kept[key] = found
        return found

    def fill(self, method: MergeMethod, settings: Callable[[int], Mapping[str, Any]], seed: int = 0) -> None:
        """Put the merge by `method` into the model.

        Args:
            settings: those of each group of layers.
        """
        names = tuple(plain_name(source.reference) for source in self.sources)
        for name in [name for name, _ in self.module.named_parameters()]:
            arrays = [self.array(index, name) for index in range(len(self.sources))]
            base = self.array(-1, name) if method.base == "required" else None
            # by the name it has in files, so that the engine draws the same bits
            stored = str(name_in_checkpoint(self._all[0].tensors, name))
            inputs = ArrayInputs(arrays, base, Randomness(seed, stored, names))
            function = method.merge(inputs, settings(self.group_of(name)))
            self._put(name, np.concatenate([function(piece) for piece in inputs.pieces()]))

    def fill_with(self, index: int) -> None:
        """Put one of the models in; -1 is the base."""
        for name in [name for name, _ in self.module.named_parameters()]:
            self._put(name, self.array(index, name))

    def _put(self, name: str, values: Array) -> None:
        import torch

        parameter = self.module.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.array(values, np.float32).reshape(tuple(parameter.shape))))


@dataclass
class Measurer:
    """Measures a model on the evaluation sources of a recipe."""

    settings: Evaluate
    tokenizer: Tokenizer
    stores: list[TreeStore]
    model: TreeModel
    device: str
    _questions: dict[str, list[Question]] = field(default_factory=dict)

    @property
    def is_smaller_better(self) -> bool:
        return self.settings.metric in _LOSSES

    @property
    def weights(self) -> dict[str, float]:
        """How much each source counts."""
        return weights_of(self.settings, {store.name: store.role for store in self.stores})

    def value(self, scores: Scores) -> float:
        """The weighted mean of the metric, negative for losses: larger is better."""
        total = sum(self.weights.values())
        mean = sum(weight * scores[name][self.settings.metric] for name, weight in self.weights.items() if weight) / total
        return -mean if self.is_smaller_better else mean

    def measure(self) -> dict[str, dict[str, float]]:
        """What every source measures with the weights that are in the model."""
        from accelerate import Accelerator

        from ftcli.evaluation.loss import measure_loss
        from ftcli.objectives.causal_lm import CausalLM

        found = {}
        accelerator = Accelerator(cpu=self.device == "cpu")
        for store in self.stores:
            loss = measure_loss(
                accelerator,
                self.model,
                CausalLM(),
                store,
                layout=self.model.layout,
                micro_batch_tokens=self.settings.micro_batch_tokens,
                pad_id=self.tokenizer.pad_id or 0,
            )
            scores = {name: float(value) for name, value in loss.to_json().items() if value is not None}
            found[store.name] = {**scores, **self._answers(store)}
        return found

    def _answers(self, store: TreeStore) -> dict[str, float]:
        """Scores of generated answers, where the metric is one or the source asks for them."""
        from ftcli.evaluation.answers import read_questions, score_answers

        generate = getattr(store.entry, "generate", None)
        if generate is None:
            return {}
        if store.name not in self._questions:
            self._questions[store.name] = read_questions(self.model.module, store, self.tokenizer, generate.limit)
        scores, _ = score_answers(self.model.module, self.tokenizer, self._questions[store.name], generate, None)
        return {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}


def look_at_data(settings: Evaluate, speaker: Source) -> None:
    """Read the first rows of every evaluation source, as the tokenizer of `speaker` writes them.

    Raises:
        RequestError: the data is wrong, or `weights` name no source.
    """
    from ftcli.data.look import look
    from ftcli.models.tokenizer import load_tokenizer

    looks = look(_data(settings), load_tokenizer(str(speaker.tokenizer_folder)))
    _check_weights(settings, {each.name: each.role for each in looks})


def _data(settings: Evaluate) -> Data:
    """The evaluation sources as a recipe has them; nothing is trained here, and `train` may not be empty in a recipe."""
    from ftcli.data.settings import Data

    sources = tuple(_with_metric(source, settings) for source in settings.sources)
    return Data.model_construct(train=(), evaluation=sources, max_length=settings.max_length)


def _check_weights(settings: Evaluate, roles: Mapping[str, str]) -> None:
    """
    Args:
        roles: of each source, by its name.

    Raises:
        RequestError: `weights` name no source, or none counts.
    """
    strangers = [name for name in settings.weights if name not in roles]
    if strangers:
        problems = [Problem(f"evaluate.weights.{name}", "is no source", f"sources: {', '.join(roles)}") for name in strangers]
        raise RequestError("the evaluation cannot be made", problems)
    if sum(weights_of(settings, roles).values()) <= 0:
        problem = Problem("evaluate", "no source counts: all have weight 0", "`role: target`, or `weights`")
        raise RequestError("the evaluation cannot be made", [problem])


def weights_of(settings: Evaluate, roles: Mapping[str, str]) -> dict[str, float]:
    """How much each source counts.

    Args:
        roles: of each source, by its name.
    """
    default = {name: float(role == "target") for name, role in roles.items()}
    return default if not settings.weights else {name: settings.weights.get(name, 0.0) for name in default}


def open_measurer(settings: Evaluate, tokenizer: Tokenizer, module: nn.Module) -> Measurer:
    """The evaluation sources, tokenised, and the model in the layout that its probe allows.

    Raises:
        RequestError: the data is wrong, or `weights` name no source.
    """
    from ftcli.data.prepare import prepare
    from ftcli.layout.model import TreeModel
    from ftcli.layout.probe import choose_layout
    from ftcli.training.assemble import cache_folder

    stores = prepare(_data(settings), tokenizer, cache_folder=cache_folder()).evaluation
    _check_weights(settings, {store.name: store.role for store in stores})
    model = TreeModel(module)
    trees = [store.tree(index) for store in stores for index in range(min(_PROBE_TREES, len(store)))]
    choose_layout(model, trees[: 2 * _PROBE_TREES], "auto", frozenset({"forest", "rows"}), settings.max_length)
    module.requires_grad_(False)
    return Measurer(settings, tokenizer, stores, model, str(next(module.parameters()).device.type))


def _with_metric(source: EvaluationSource, settings: Evaluate) -> EvaluationSource:
    """The source, asked for generated answers where the metric needs them."""
    if settings.metric in _LOSSES or (source.generate is not None and settings.metric in [m.kind for m in source.generate.metrics]):
        return source
    from ftcli.data.settings import Generate

    more = [] if source.generate is None else list(source.generate.model_dump()["metrics"])
    fields: dict[str, Any] = {"metrics": [*more, {"kind": settings.metric}], "max_new_tokens": settings.max_new_tokens}
    return source.model_copy(update={"generate": Generate.model_validate(fields, strict=False)})


def load_frame(source: Source, device: str, speaker: Source | None = None) -> tuple[PreTrainedModel, Tokenizer]:
    """A model of the architecture of `source`, in float32, with the tokenizer of `speaker`, which may have learnt a template."""
    import torch

    from ftcli.models.load import load_model
    from ftcli.models.quiet import quiet_libraries
    from ftcli.models.settings import Model
    from ftcli.models.tokenizer import load_tokenizer

    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    tokenizer = load_tokenizer(str(Path((speaker or source).tokenizer_folder)))
    with quiet_libraries():
        return load_model(Model(base=str(source.folder)), tokenizer, dtype="float32", device=where), tokenizer
