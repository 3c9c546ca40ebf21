"""What a merge will do, tensor by tensor, from headers and configurations alone; or everything that is wrong with it, at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftcli.errors import Problem, RequestError
from ftcli.merging.computable import are_all_same, is_kept, stranger, uncomputable
from ftcli.merging.fit import check_documents, check_layers, check_settings, check_shapes, compare_sources
from ftcli.merging.layers import (
    LayerMap,
    embedding_name,
    is_before_layers,
    is_buffer,
    is_embedding,
    is_head,
    is_tied,
    layer_map,
    text_config,
)
from ftcli.merging.merged_config import merged_configuration
from ftcli.merging.numbers import STORED
from ftcli.merging.pieces import PIECE_ELEMENTS, rows_and_columns
from ftcli.merging.planned import SHARD_BYTES, Input, Plan, Shard, TensorPlan, lay_out
from ftcli.merging.recipe import MergeRecipe, Module, Part, Slice, recipe_error
from ftcli.merging.remote import download_bytes
from ftcli.merging.reset import Homes, with_reset
from ftcli.merging.settings import resolve
from ftcli.merging.sources import Source, open_source
from ftcli.merging.values import TensorPlace
from ftcli.merging.vocabulary import Vocabulary, plan_vocabulary
from ftcli.merging.with_statistics import Statistics
from ftcli.models.layer_lists import LayerOrigin
from ftcli.units import format_bytes

_LISTED = 10


@dataclass
class _Draft:
    """What is known while planning."""

    recipe: MergeRecipe
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    index: dict[str, int] = field(default_factory=dict)
    donor: int = 0
    """The source whose configuration and tokenizer the merged model starts from."""
    maps: dict[tuple[int, str | None], LayerMap] = field(default_factory=dict)
    origins: list[LayerOrigin] = field(default_factory=list)
    tensors: list[TensorPlan] = field(default_factory=list)
    uncomputable: dict[str, Input] = field(default_factory=dict)
    """Tensors that would have to be computed with and cannot be, by their names in the merged model."""
    homes: Homes = field(default_factory=dict)
    taken: set[tuple[int, str]] = field(default_factory=set)
    vocabulary: Vocabulary | None = None
    said: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.statistics = Statistics(self.recipe)

    def wrong(self, where: str, what: str, hint: str | None = None) -> None:
        """A problem, once."""
        if (key := f"{where} {what}") not in self.said:
            self.said.add(key)
            self.problems.append(Problem(where, what, hint))

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def plan_merge(recipe: MergeRecipe, output: Path | None = None, *, threads: int = 1, shard_bytes: int = SHARD_BYTES) -> Plan:
    """The plan of a merge.

    Args:
        output: where it is to be written, for the disk to be looked at; None looks at none.
        threads: how many tensors are merged at once, for the estimate of memory.

    Raises:
        RecipeError: something is wrong with the recipe or with how the models fit; names every problem.
    """
    draft = _Draft(recipe)
    _open_sources(draft)
    if draft.problems:
        raise recipe_error(recipe.path, draft.problems)
    donor = draft.index[recipe.base] if recipe.base is not None else draft.index[recipe.modules[0].slices[0].parts[0].model]
    draft.donor = donor
    compare_sources(draft.sources, donor, draft.warn)
    check_documents(draft.sources[donor], draft.wrong)
    draft.statistics.open(draft.wrong)
    if recipe.dtype is None and recipe.document.data.get("dtype") is not None:
        what = "tensors are computed in float32 and keep the dtype they are stored in"
        draft.warn(f"`dtype: {recipe.document.data['dtype']}`: {what}; `out_dtype` says another")
    draft.vocabulary = plan_vocabulary(recipe, draft.sources, draft.index, donor, draft.problems, draft.warnings)
    names = [module.name for module in recipe.modules if module.name is not None]
    for module in recipe.modules:
        _plan_module(draft, module, names, donor)
    if len(recipe.modules) == 1 and recipe.modules[0].name is not None:
        draft.wrong(recipe.where(("modules",)), f"only `{names[0]}` is merged, and nothing says what the rest is", "add a module `default`")
    draft.problems += [*uncomputable(draft.sources, draft.uncomputable), *draft.statistics.problems()]
    _unused(draft)
    origins, vocabulary = draft.origins, draft.vocabulary
    reset = with_reset(recipe, draft.tensors, draft.sources, draft.index, draft.homes, draft.wrong)
    config = merged_configuration(draft.sources, donor, reset, origins, vocabulary, recipe, draft.wrong, draft.warn)
    check_settings(draft.tensors, draft.wrong)
    check_layers(draft.origins, draft.sources, donor, draft.wrong, draft.warn)
    if not draft.problems:
        check_shapes(draft.tensors, draft.sources, donor, config, draft.wrong, same_rows=draft.vocabulary is None)
    tensors, shards = lay_out(reset, shard_bytes)
    read_bytes = sum(
        draft.sources[item.source].tensor(item.name).num_bytes
        for tensor in tensors
        for item in (*tensor.inputs, *([tensor.base] if tensor.base else []))
    )
    plan = Plan(
        recipe, tuple(draft.sources), donor, tensors, shards, config, draft.vocabulary, tuple(draft.warnings), read_bytes,
        _memory(tensors, threads),
    )  # fmt: skip
    if output is not None:
        _look_at_disk(draft, plan, output)
    if draft.problems:
        raise recipe_error(recipe.path, draft.problems)
    return plan


def _open_sources(draft: _Draft) -> None:
    recipe = draft.recipe
    for reference in recipe.references():
        try:
            draft.sources.append(open_source(reference, recipe.path.resolve().parent, to_plan=True))
            draft.index[reference] = len(draft.sources) - 1
        except RequestError as error:
            place = next((path for path, value in _texts(recipe.document.data, ()) if value == reference), ())
            found = error.problems or (Problem("", error.summary, error.hint),)
            for problem in found:
                what = problem.what if problem.where in ("", reference) else f"{problem.where}: {problem.what}"
                draft.wrong(recipe.where(place), what if f"`{reference}`" in what else f"`{reference}`: {what}", problem.hint)


def _texts(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    if isinstance(value, str):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _texts(inner, (*path, key))


def _map(draft: _Draft, source: int, module: str | None, names: list[str]) -> LayerMap | None:
    if (source, module) not in draft.maps:
        found = layer_map(draft.sources[source], module, names)
        if isinstance(found, Problem):
            draft.wrong(found.where, found.what, found.hint)
            return None
        draft.maps[source, module] = found
    return draft.maps[source, module]


@dataclass(frozen=True)
class _Mapped:
    """A part of a slice, opened."""

    part: Part
    source: int
    layers: LayerMap
    first: int
    last: int


def _plan_module(draft: _Draft, module: Module, names: list[str], donor: int) -> None:
    count = 0
    slices = [_mapped_slice(draft, module, piece, names) for piece in module.slices]
    if any(parts is None for parts in slices):
        return
    total = sum(parts[0].last - parts[0].first for parts in slices if parts)
    for number, (piece, parts) in enumerate(zip(module.slices, slices, strict=True)):
        assert parts is not None
        lead = _lead(draft, piece, parts)
        length = lead.last - lead.first
        if number == 0:
            _plan_outside(draft, module, piece, parts, before=True, depth=0.0)
        for index in range(length):
            depth = index / (length - 1) if length > 1 else 1.0
            _plan_layer(draft, module, piece, parts, index, count, depth)
            if module.name is None:
                draft.origins.append((text_config(draft.sources[lead.source].config), lead.first + index))
            count += 1
        if number == len(slices) - 1:
            _plan_outside(draft, module, piece, parts, before=False, depth=1.0)
    assert count == total
    _look_for_extras(draft, module, slices)


def _lead(draft: _Draft, piece: Slice, parts: list[_Mapped]) -> _Mapped:
    """The part whose names and configuration count: the base's where it is there, else the first."""
    base = piece.base or draft.recipe.base
    return next((mapped for mapped in parts if mapped.part.model == base), parts[0])


def _mapped_slice(draft: _Draft, module: Module, piece: Slice, names: list[str]) -> list[_Mapped] | None:
    recipe, parts = draft.recipe, list(piece.parts)
    base = piece.base or recipe.base
    if base is not None and recipe.method.base != "ignored" and all(part.model != base for part in parts):
        if not module.is_whole:
            hint = f"add `{{model: {base}, layer_range: ...}}` to the sources"
            draft.wrong(
                recipe.where(piece.path), "the base is not among the sources, and nothing says which of its layers belong here", hint
            )
            return None
        parts.append(Part(base, {}, piece.path))
    mapped = []
    for part in parts:
        source = draft.index[part.model]
        layers = _map(draft, source, module.name, names)
        if layers is None:
            return None
        first, last = part.layers or (0, layers.num_layers)
        last = last if last > 0 else layers.num_layers + last
        is_inside = first < last <= layers.num_layers or (part.layers is None and layers.num_layers == 0)
        if not is_inside and part.path == ("dus",):
            drop = max(abs(end) for end in part.layers or ())
            what = f"found {drop}, `{part.model}` has {layers.num_layers} layers, allowed: fewer"
            draft.wrong(recipe.where(("dus", "drop")), what)
            return None
        if not is_inside:
            where = recipe.where((*part.path, "layer_range"))
            draft.wrong(where, f"found layers {first} to {last}, `{part.model}` has {layers.num_layers}")
            return None
        mapped.append(_Mapped(part, source, layers, first, last))
    counts = {mapped_part.last - mapped_part.first for mapped_part in mapped}
    if len(counts) > 1:
        listed = ", ".join(f"`{part.part.model}` {part.last - part.first}" for part in mapped)
        draft.wrong(recipe.where(piece.path), f"the models have different numbers of layers: {listed}", "use `slices` with `layer_range`")
        return None
    return mapped


def _plan_outside(draft: _Draft, module: Module, piece: Slice, parts: list[_Mapped], *, before: bool, depth: float) -> None:
    lead = _lead(draft, piece, parts)
    names = list(lead.layers.outside)
    if not before:
        names += [name for mapped in parts for name in mapped.layers.outside if is_head(name) and name not in names]
        names += [] if any(map(is_head, names)) else _written_head(draft)
    tied = is_tied(draft.sources[lead.source].config) is True
    for name in dict.fromkeys(names):
        if is_before_layers(name) is not before or (is_buffer(name) and draft.sources[lead.source].tensors[name].dtype not in STORED):
            continue
        # a head that is the embedding gets what the embedding gets
        place = TensorPlace(name, None, 0.0 if tied and is_head(name) and name in lead.layers.outside else depth)
        _plan_tensor(draft, module, piece, parts, place, [name] * len(parts))


def _written_head(draft: _Draft) -> list[str]:
    """The head that has to have a tensor of its own although the last slice's model ties it: another model parts it."""
    donor = draft.sources[draft.donor]
    if len(draft.recipe.modules) > 1:
        return []
    parted = [
        source.adapter.own_head.head for source in draft.sources if source.adapter is not None and source.adapter.own_head is not None
    ]
    if is_tied(donor.config) is not False:
        return parted[:1]
    return [name for name in donor.tensors if is_head(name) and name.endswith(".weight")]


def _plan_layer(draft: _Draft, module: Module, piece: Slice, parts: list[_Mapped], index: int, layer: int, depth: float) -> None:
    lead = _lead(draft, piece, parts)
    home = _home(draft, module, parts, lead, index) if draft.recipe.reset is not None and draft.recipe.base is not None else None
    for rest in lead.layers.by_layer[lead.first + index]:
        if home is not None:
            draft.homes[lead.layers.name(layer, rest)] = home[0].name(home[1], rest)
        names = [mapped.layers.name(mapped.first + index, rest) for mapped in parts]
        _plan_tensor(draft, module, piece, parts, TensorPlace(lead.layers.name(layer, rest), layer, depth), names)


def _home(draft: _Draft, module: Module, parts: list[_Mapped], lead: _Mapped, index: int) -> tuple[LayerMap, int] | None:
    """The base's layer that a merged layer is reset to: the one that the slice takes from it, else the one of the same number."""
    recipe = draft.recipe
    assert recipe.base is not None
    named = [other.name for other in recipe.modules if other.name is not None]
    layers = _map(draft, draft.index[recipe.base], module.name, named)
    if layers is None:
        return None
    own = next((mapped for mapped in parts if mapped.part.model == recipe.base), None)
    if own is None and layers.num_layers != lead.layers.num_layers:
        counts = f"`{lead.part.model}` has {lead.layers.num_layers} layers, the base {layers.num_layers}"
        what = f"nothing says which layers of the base those of the merged model are reset to: {counts}"
        draft.wrong(recipe.where(("reset",)), what, "reset a merge of models of the base's depth, or leave `reset` out")
        return None
    return layers, (own or lead).first + index


def _plan_tensor(draft: _Draft, module: Module, piece: Slice, parts: list[_Mapped], place: TensorPlace, names: list[str]) -> None:
    recipe = draft.recipe
    found: list[tuple[_Mapped, Input]] = []
    for mapped, name in zip(parts, names, strict=True):
        item = _find(draft, mapped, name)
        if item is None:
            if not is_buffer(name):
                draft.wrong(mapped.part.model, f"tensor `{name}` is not there, and other models have it", _missing_hint(name))
            return
        found.append((mapped, item))
        draft.taken.add((item.source, item.name))
    base_name = piece.base or recipe.base
    takes_base = recipe.method.base != "ignored" and base_name is not None
    base = next((item for mapped, item in found if takes_base and mapped.part.model == base_name), None)
    models = [(mapped.part, item) for mapped, item in found if not (takes_base and mapped.part.model == base_name)]
    lead = next(item for mapped, item in found if mapped is _lead(draft, piece, parts))
    stored = draft.sources[lead.source].tensor(lead.name)
    shape = _common_shape(draft, place.name, stored.shape, [item for _, item in found])
    if shape is None:
        return
    dtype = stored.dtype if stored.dtype not in STORED else recipe.dtype or ("F32" if stored.dtype == "F64" else stored.dtype)
    is_copied = _is_copied(draft, place.name, [item for _, item in found], stored.size == 0, has_base=base is not None)
    resolved = resolve(recipe, module, piece, [part for part, _ in models], place, draft.wrong, draft.warn)
    if resolved is None:
        return
    order = resolved.order
    inputs, settings = tuple(models[position][1] for position in order), resolved.settings
    is_scaled = recipe.method.name == "passthrough" and settings["scale"][0] not in (None, 1)
    is_copy = is_copied or (recipe.method.name == "passthrough" and not is_scaled)
    odd = None if is_copied else stranger(draft.sources, [item for _, item in found])
    if odd is not None and not (is_copy and _is_taken_as_it_is(draft, place.name, odd)):
        draft.uncomputable[place.name] = odd
    shapes = [draft.sources[item.source].tensor(item.name).shape for item in inputs]
    statistics = draft.statistics.of_tensor([models[position][0] for position in order], inputs, shapes)
    settings = {} if is_copy else settings
    draft.tensors.append(
        TensorPlan(
            place.name, shape, dtype, (lead,) if is_copied else inputs, None if is_copy else base, settings, resolved.labels,
            is_copy, draft.vocabulary is not None and (is_embedding(place.name) or is_head(place.name)), statistics,
        )
    )  # fmt: skip


def _is_copied(draft: _Draft, name: str, items: list[Input], is_empty: bool, *, has_base: bool) -> bool:
    """True where nothing is to be computed whatever the method: buffers, tensors without numbers, and the same bits in every model."""
    if is_empty or (is_buffer(name) and has_base):
        return True
    odd = stranger(draft.sources, items)
    if odd is None:
        return False
    if is_kept(name, draft.sources[odd.source].tensor(odd.name).dtype):
        return True
    return draft.vocabulary is None and draft.recipe.dtype is None and len(items) > 1 and are_all_same(draft.sources, items)


def _is_taken_as_it_is(draft: _Draft, name: str, item: Input) -> bool:
    """True when a copy of a tensor is its bytes: no adapter, no other dtype, no other order of its rows."""
    is_permuted = draft.vocabulary is not None and (is_embedding(name) or is_head(name))
    return draft.sources[item.source].is_as_stored(item.name) and draft.recipe.dtype is None and not is_permuted


def _find(draft: _Draft, mapped: _Mapped, name: str) -> Input | None:
    """The tensor of that name, or the embedding where a head is asked for that is tied to it."""
    source = draft.sources[mapped.source]
    if name in source.tensors:
        return Input(mapped.source, name)
    embedding = embedding_name(source)
    if name.endswith(".weight") and is_head(name) and is_tied(source.config) is not False and embedding is not None:
        return Input(mapped.source, embedding)
    return None


def _missing_hint(name: str) -> str | None:
    return "an untied head cannot be merged with none" if is_head(name) else None


def _common_shape(draft: _Draft, name: str, lead: tuple[int, ...], items: list[Input]) -> tuple[int, ...] | None:
    shapes = {draft.sources[item.source].reference: draft.sources[item.source].tensor(item.name).shape for item in items}
    is_vocabulary = is_embedding(name) or is_head(name)
    if draft.vocabulary is not None and is_vocabulary:
        shapes = {reference: (draft.vocabulary.size, *shape[1:]) for reference, shape in shapes.items()}
        lead = (draft.vocabulary.size, *lead[1:])
    if len(set(shapes.values())) == 1:
        return lead
    listed = ", ".join(f"`{reference}` {list(shape)}" for reference, shape in shapes.items())
    if is_vocabulary and len({shape[1:] for shape in shapes.values()}) == 1:
        if draft.recipe.tokenizer is not None:
            return lead  # why there is no merged vocabulary is said already
        draft.wrong(name, f"the models have vocabularies of different sizes: {listed}", "add `tokenizer: {source: base}` or `union`")
    else:
        draft.wrong(name, f"the shapes differ: {listed}")
    return None


def _look_for_extras(draft: _Draft, module: Module, slices: list[list[_Mapped] | None]) -> None:
    """Tensors of used layers, and those outside the layers, that would be left out."""
    for mapped in (mapped for parts in slices if parts is not None for mapped in parts):
        source = draft.sources[mapped.source]
        names = [mapped.layers.name(layer, rest) for layer in range(mapped.first, mapped.last) for rest in mapped.layers.by_layer[layer]]
        names += mapped.layers.outside if module.is_whole else []
        extra = [name for name in names if (mapped.source, name) not in draft.taken and not is_buffer(name)]
        if extra and not draft.problems:
            listed = ", ".join(f"`{name}`" for name in extra[:_LISTED]) + (
                f" ... and {len(extra) - _LISTED} more" if len(extra) > _LISTED else ""
            )
            draft.wrong(source.reference, f"has tensors that others have not: {listed}")


def _unused(draft: _Draft) -> None:
    for setting in draft.recipe.settings():
        for entry in setting.unused():
            said = entry.text or (entry.pattern.pattern if entry.pattern else f"layers {entry.layers}")
            draft.warn(f"{draft.recipe.where(entry.path)}: `{said}` matches no tensor (or an entry before it matches them first)")


def _memory(tensors: tuple[TensorPlan, ...], threads: int) -> int:
    """About the most that is in memory at once, besides the program itself."""
    largest = 0
    for tensor in tensors:
        rows, columns = rows_and_columns(tensor.shape)
        piece = min(rows * columns, max(PIECE_ELEMENTS, columns))
        whole = sum(item.size for item in tensor.statistics if item is not None) if tensor.statistics else 0
        largest = max(largest, 4 * piece * (3 * len(tensor.inputs) + 6) + 8 * whole)
    return largest * threads


def _look_at_disk(draft: _Draft, plan: Plan, output: Path) -> None:
    existing = next(path for path in (output.resolve(), *output.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if plan.write_bytes > free:
        what = f"the merged model needs {format_bytes(plan.write_bytes)}, and {format_bytes(free)} are free"
        draft.wrong(str(output), what, "free some space, or choose another disk")
    remote = next((source for source in plan.sources if source.remote is not None), None)
    if remote is not None and (needed := download_bytes(plan.sources)) > (free := shutil.disk_usage(remote.folder).free):
        what = f"models that are to be fetched need {format_bytes(needed)}, and {format_bytes(free)} are free"
        draft.wrong(str(remote.folder), what, "free some space, or set HF_HOME to another disk")


__all__ = ["SHARD_BYTES", "Input", "Plan", "Shard", "TensorPlan", "lay_out", "plan_merge"]
