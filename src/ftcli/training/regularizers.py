"""The regularizers of a run at work: what each asks for is made here, once, and kept where a resumed run finds it.

In the run folder:
    start.safetensors     the first values of an adapter's weights; those of whole models are loaded again from their base
    fisher.safetensors    the Fisher information that `ewc` holds with, for a resumed run and for later ones
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import Problem, RequestError, RunError
from ftcli.layout.model import inner_model
from ftcli.models.fingerprint import answers_fingerprint
from ftcli.training.fisher_file import FISHER_FILE, read_fisher, require_fisher_file, require_same_shapes, save_tensors
from ftcli.training.lineage import Beginning, beginning_of, beginnings_before
from ftcli.training.proofs import frozen_tensors, hash_tensors
from ftcli.training.regularizer_look import collecting, fisher_data, named_vocabulary, raise_any, require_same_vocabulary
from ftcli.training.resources import teacher_kind, teacher_refused

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ftcli.data.prepare import Progress
    from ftcli.data.store import TreeStore
    from ftcli.objectives.regularize import Regularizer
    from ftcli.objectives.regularize.ewc import EWC
    from ftcli.objectives.regularize.regularizer import AtWork
    from ftcli.objectives.regularize.start import Start
    from ftcli.objectives.regularize.teacher import Teacher
    from ftcli.objectives.regularize.teacher_cache import TeacherCache
    from ftcli.recipe.recipe import Recipe
    from ftcli.training.assemble import DataParts, ModelParts

START_FILE = "start.safetensors"
# Raise it when the same weights and trees give other answers or another Fisher information than before.
CODE_VERSION = 2
MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Place:
    """Where what belongs to a run is kept, and who is told how far it is."""

    folder: Path | None = None
    """Of the run; None where nothing shall be left."""
    recorded_start: str | None = None
    """Hash of the first values of the trained weights, where the run is resumed."""
    progress: Progress | None = None


def regularizers_of(
    recipe: Recipe,
    data: DataParts,
    parts: ModelParts,
    accelerator: Accelerator,
    load_base: Callable[[Recipe], PreTrainedModel],
    place: Place,
) -> tuple[AtWork, ...]:
    """The recipe's regularizers, ready for the first step; those of weight 0 are not there.

    Args:
        parts: the weights as the run begins, or, where an adapter is about to be restored, any others.
        load_base: the base of a recipe on the run's device.

    Raises:
        RequestError: one of them does not fit the run.
        RunError: the run is resumed, and its first weights cannot be had again.
    """
    from ftcli.objectives.regularize.regularizer import RegularizeContext

    wanted = [(index, settings) for index, settings in enumerate(recipe.objective.regularize) if settings.weight > 0]
    if not wanted:
        return ()
    making = _Making(recipe, data, parts, accelerator, load_base, place)
    making.require_same_start()
    making.require_all([settings for _, settings in wanted])
    context = RegularizeContext(
        roles=[entry.role for entry in recipe.data.train],
        start=lambda: making.start,
        head_names=making.head_names(),
        teacher=making.teacher,
        cached=making.cached,
        fisher=making.fisher,
    )
    kinds = [settings.kind for _, settings in wanted]
    return tuple(
        settings.build(settings.kind if kinds.count(settings.kind) == 1 else f"{settings.kind}.{index}", context)
        for index, settings in wanted
    )


def require_regularizers(
    recipe: Recipe,
    data: DataParts,
    parts: ModelParts,
    accelerator: Accelerator,
    load_base: Callable[[Recipe], PreTrainedModel],
    progress: Progress | None,
) -> None:
    """Refuse what `regularizers_of` would refuse, and leave nothing of it.

    Raises:
        RequestError: all that does not fit the run.
    """
    making = _Making(recipe, data, parts, accelerator, load_base, Place(progress=progress))
    making.require_all([settings for settings in recipe.objective.regularize if settings.weight > 0])


@dataclass
class _Making:
    """What regularizers ask for, each made when it is first asked for."""

    recipe: Recipe
    data: DataParts
    parts: ModelParts
    accelerator: Accelerator
    load_base: Callable[[Recipe], PreTrainedModel]
    place: Place
    teachers: dict[str, Teacher] = field(default_factory=dict)

    def require_all(self, wanted: Sequence[Regularizer]) -> None:
        """Have all that can be had before anything is measured.

        Raises:
            RequestError: all that cannot be had, or does not fit the run.
        """
        from ftcli.objectives.regularize.ewc import EWC
        from ftcli.objectives.regularize.kl import KL

        problems: list[Problem] = []
        for settings in wanted:
            if isinstance(settings, EWC) and not self._has_fisher:
                with collecting(problems):
                    self._fisher_stores(settings)
                with collecting(problems):
                    self._require_earlier(settings)
            elif isinstance(settings, KL):
                with collecting(problems):
                    settings.held_sources([entry.role for entry in self.recipe.data.train])
                with collecting(problems):
                    self.teacher(settings.teacher)
        raise_any(problems)

    # ---- the start -------------------------------------------------------------------------------------------------------

    @cached_property
    def start(self) -> Start:
        """The first values of the trained weights, whatever they are now."""
        from safetensors.torch import load_file

        from ftcli.methods.parameter_groups import trained_parameters
        from ftcli.objectives.regularize.start import Start

        folder = self.place.folder
        path = None if folder is None or self.recipe.method.artefact == "model" else folder / START_FILE
        if path is not None and path.is_file():
            return Start(dict(trained_parameters(self.parts.module)), load_file(path))
        start = Start.of(self.parts.module)
        if path is not None and self.accelerator.is_main_process:
            save_tensors(path, start.values)
        return start

    def require_same_start(self) -> None:
        """Refuse to hold near another start than the run had.

        Raises:
            RunError: it is another.
        """
        recorded = self.place.recorded_start
        if recorded is not None and hash_tensors(self.start.values.items()) != recorded:
            raise RunError("the weights that this run began with cannot be had again: `objective.regularize` would hold near others")

    def head_names(self) -> frozenset[str]:
        """Trained parameters of a fresh classification head."""
        from ftcli.methods.parameter_groups import trained_parameters
        from ftcli.models.classifier import head_names

        heads = head_names(inner_model(self.parts.module))
        names = [name for name, _ in trained_parameters(self.parts.module)]
        return frozenset(name for name in names if any(f".{head}." in f".{name}" for head in heads))

    # ---- teachers --------------------------------------------------------------------------------------------------------

    def teacher(self, name: str) -> Teacher:
        """The model that answers under `name`, one for all that ask."""
        if name not in self.teachers:
            self.teachers[name] = self._new_teacher(name)
        return self.teachers[name]

    def _new_teacher(self, name: str) -> Teacher:
        from ftcli.methods.adapter_off import trained_in_place
        from ftcli.objectives.regularize.start import Start
        from ftcli.objectives.regularize.teacher import AdapterOff, AtStart, OtherModel

        kind = teacher_kind(name, self.recipe, self.parts.module)
        if kind == "off":
            # Without `init_from` they begin as they are in the base, resumed or not: a checkpoint's weights come later.
            in_place = trained_in_place(self.parts.module)
            return AdapterOff(Start.of(self.parts.module, in_place) if in_place else None)
        if kind == "start":
            return AtStart(self.start)
        return OtherModel(self._other_model(None if name == "base" else name))

    def _other_model(self, reference: str | None) -> Any:
        """A model for the run's batches: another one, or the recipe's own base.

        Raises:
            RequestError: its vocabulary is another, or the layout does not fit it.
        """
        from ftcli.layout.model import TreeModel
        from ftcli.layout.probe import choose_layout

        recipe, ours = self.recipe, len(inner_model(self.parts.module).get_output_embeddings().weight)
        if reference is not None:
            if (named := named_vocabulary(reference)) is not None:
                require_same_vocabulary(reference, named, ours)
            # What else is said of the base, its growth for one, is not said of the teacher.
            kept = recipe.model.model_dump(include={"dtype", "attention", "trust_remote_code"})
            recipe = recipe.model_copy(update={"model": type(recipe.model)(base=reference, **kept)})
        try:
            base = self.load_base(recipe)
        except RequestError as error:
            if reference is None:
                raise
            raise teacher_refused(error) from error
        require_same_vocabulary(reference or recipe.model.base, len(base.get_output_embeddings().weight), ours)
        model = TreeModel(base)
        trees, layout = self.data.probe_trees(), self.parts.layout.layout
        choose_layout(model, trees, layout, frozenset({"forest", "rows"}), self.recipe.data.max_length)
        return model

    def cached(self, teacher: Teacher, name: str, sources: Sequence[int], top_k: int, temperature: float) -> TeacherCache:
        """The answers to all targets of these sources that the run will see, from disk or computed now."""
        from ftcli.objectives.regularize.teacher_cache import TeacherCache, write_answers

        seen = self._trees_seen(sources)
        vocabulary = len(inner_model(self.parts.module).get_output_embeddings().weight)
        top_k = min(top_k, vocabulary - 1)
        folders = {}
        with self.accelerator.main_process_first():
            key = self._teacher_key(teacher, name)
            for source, trees in seen.items():
                store = self.data.prepared.train[source]
                settings = [key, top_k, temperature, self.parts.layout.layout, self.recipe.objective.model_dump(exclude={"regularize"})]
                digest = hashlib.sha256(repr(settings).encode() + trees.tobytes()).hexdigest()[:32]
                folders[source] = store.folder / f"teacher-{digest}"
                if not folders[source].is_dir():
                    write_answers(
                        folders[source],
                        teacher,
                        self.parts.model,
                        store,
                        trees,
                        self.recipe.objective,
                        top_k=top_k,
                        temperature=temperature,
                        micro_batch_tokens=MICRO_BATCH_TOKENS,
                        pad_id=self.data.tokenizer.pad_id or 0,
                        tell=self._teller(len(trees), f"answers of the teacher on {store.name}"),
                    )
        return TeacherCache(folders)

    def _trees_seen(self, sources: Sequence[int]) -> dict[int, Any]:
        """By source, the trees that some step of the run has, ascending."""
        import numpy as np

        # A mark a tree: a run of millions of examples has room for it.
        marks = {source: bytearray() for source in sources}
        for step in range(1, self.data.order.num_steps + 1):
            for source, tree in self.data.order.examples_at(step):
                if (own := marks.get(source)) is None:
                    continue
                if tree >= len(own):
                    own.extend(bytes(max(len(own), tree + 1 - len(own))))
                own[tree] = 1
        seen = {source: np.flatnonzero(np.frombuffer(own, dtype=np.uint8)).astype(np.int64) for source, own in marks.items()}
        return {source: trees for source, trees in seen.items() if len(trees)}

    def _teacher_key(self, teacher: Teacher, name: str) -> str:
        """All that a teacher's answers depend on but the trees."""
        from ftcli.methods.adapter_off import tensors_without_adapter

        is_off = teacher_kind(name, self.recipe, self.parts.module) == "off"
        with teacher.lent(self.parts.model) as model:
            tensors = tensors_without_adapter(model.module) if is_off else [*model.module.named_parameters(), *model.module.named_buffers()]
            method = None if is_off else self.recipe.method
            return self._key(model.module, tensors, method)

    def _key(self, module: nn.Module, tensors: Iterable[tuple[str, Tensor]], *about: object) -> str:
        """All that what is computed with these weights depends on."""
        precision = self.accelerator.mixed_precision, self.accelerator.device.type
        return answers_fingerprint(inner_model(module), tensors, CODE_VERSION, *precision, *about)

    # ---- the Fisher information ------------------------------------------------------------------------------------------

    def fisher(self, settings: EWC) -> dict[str, Tensor]:
        """F at the start, with that of an earlier run where one is named; the main process measures for all."""
        kept = None if self.place.folder is None else self.place.folder / FISHER_FILE
        with self.accelerator.main_process_first():
            if kept is not None and self._has_fisher:
                return self._read(kept, "objective.regularize")
            found = self._measured(settings)
            if settings.earlier is not None:
                from ftcli.objectives.regularize.fisher import with_earlier

                earlier = self._read(Path(settings.earlier) / FISHER_FILE, "objective.regularize.earlier")
                found = with_earlier(found, earlier, settings.decay)
            if kept is not None:
                save_tensors(kept, found)
        return found

    @property
    def _has_fisher(self) -> bool:
        """The run has measured it already."""
        return self.place.folder is not None and (self.place.folder / FISHER_FILE).is_file()

    def _require_earlier(self, settings: EWC) -> None:
        """
        Raises:
            RequestError: the earlier run has no Fisher information, or it is not of the weights that train here.
        """
        if settings.earlier is None:
            return
        require_fisher_file(settings.earlier)
        run, where = Path(settings.earlier), "objective.regularize.earlier"
        require_same_shapes(run / FISHER_FILE, where, {name: parameter for name, parameter, _ in self.start.pairs()})
        own = Beginning(self.parts.base_fingerprint, hash_tensors(self.start.values.items()))
        if beginning_of(run) not in (own, *beginnings_before(self.recipe)):
            what = f"`{run}` began with other weights than this run and all that it goes on from"
            hint = "a run that this one goes on from, or one that began as it does: the same base, and of an adapter the same seed"
            raise RequestError("the Fisher information does not fit", [Problem(where, what, hint)])

    def _read(self, path: Path, where: str) -> dict[str, Tensor]:
        """F from a file, on the devices of the weights."""
        return read_fisher(path, where, {name: parameter for name, parameter, _ in self.start.pairs()})

    def _measured(self, settings: EWC) -> dict[str, Tensor]:
        """F from the cache, or measured now."""
        from ftcli.objectives.regularize.fisher import measured_fisher

        stores = self._fisher_stores(settings)
        module = self.parts.module
        tensors = [*self.start.values.items(), *frozen_tensors(module), *module.named_buffers()]
        about = [
            *(settings.examples, settings.labels, self.recipe.train.seed, self.parts.layout.layout),
            *(self.recipe.objective.model_dump(exclude={"regularize"}), [store.report.cache_key for store in stores]),
        ]
        path = stores[0].folder / f"fisher-{self._key(module, tensors, self.recipe.method, about)[:32]}.safetensors"
        if path.is_file():
            return self._read(path, "objective.regularize")
        found = measured_fisher(
            self.parts.model,
            self.start,
            stores,
            self.recipe.objective,
            examples=settings.examples,
            draws_labels=settings.labels == "model",
            seed=self.recipe.train.seed,
            pad_id=self.data.tokenizer.pad_id or 0,
            tell=self._teller(min(settings.examples, sum(map(len, stores))), "measuring the Fisher information"),
        )
        save_tensors(path, found)
        return found

    def _fisher_stores(self, settings: EWC) -> Sequence[TreeStore]:
        """What F is measured on.

        Raises:
            RequestError: there are no such rows.
        """
        from ftcli.data.cache import default_cache_folder
        from ftcli.data.prepare import prepare
        from ftcli.objectives.regularize.regularizer import sources_with
        from ftcli.training.own_text import with_own_text

        rows = fisher_data(settings, self.recipe.data)
        if rows is None:
            found = sources_with("replay", [entry.role for entry in self.recipe.data.train])
            if not found:
                what = "no training source has `role: replay` to measure on"
                problem = Problem("objective.regularize", what, "give `rows: {source: ...}`: text of the kind to be kept")
                raise RequestError("`ewc` has nothing to measure on", [problem])
            return [self.data.prepared.train[index] for index in found]
        described = self.recipe.model_copy(update={"data": rows})
        data, _ = with_own_text(described, default_cache_folder(), self.place.progress)
        return prepare(data, self.data.tokenizer, cache_folder=default_cache_folder(), progress=self.place.progress).train

    def _teller(self, total: int, what: str) -> Callable[[int], None]:
        progress = self.place.progress
        return (lambda done: None) if progress is None else (lambda done: progress.update(done, total, what))
