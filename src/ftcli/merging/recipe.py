"""A merge recipe: mergekit's YAML, read strictly, with a few additions.

```yaml
merge_method: ties
base_model: org/base
models:
  - model: org/math
    parameters: {weight: [0.2, 0.8], density: 0.5}        # a gradient over the layers
  - model: org/code+org/adapter
    parameters: {weight: [{filter: mlp, value: 0.7}, {value: 0.3}]}
dtype: bfloat16
```

What mergekit ignores is an error here: unknown keys, misspelt parameters, parameters where they have no effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftcli.errors import Problem, RecipeError, RequestError, did_you_mean
from ftcli.merging.methods.method import MergeMethod
from ftcli.merging.methods.registry import METHODS
from ftcli.merging.numbers import DTYPES
from ftcli.merging.references import short_form
from ftcli.merging.values import Conditional, Setting
from ftcli.recipe.yaml import Document, KeyPath, Place, YamlError, decode, describe, parse, where

Parameters = Mapping[str, Setting]


@dataclass(frozen=True)
class Part:
    """A model, or some of its layers."""

    model: str
    parameters: Parameters
    path: KeyPath
    layers: tuple[int, int] | None = None
    """First and last (exclusive); None is all. A negative last counts from the end."""
    statistics: str | None = None
    """A safetensors file with what fisher or regmean need to know of the model."""


@dataclass(frozen=True)
class Slice:
    """Some layers of the merged model, and whose layers they are made of."""

    parts: tuple[Part, ...]
    parameters: Parameters
    path: KeyPath
    base: str | None = None


@dataclass(frozen=True)
class Module:
    """The whole model, or the tensors with `name` among the parts of their names."""

    name: str | None
    slices: tuple[Slice, ...]
    parameters: Parameters
    is_whole: bool
    """Written as `models`: every part has all of its layers."""


@dataclass(frozen=True)
class TokenSource:
    """Where the embedding of one token comes from."""

    kind: str
    """zero, model, or model_token."""
    model: str | None = None
    token: str | int | None = None
    """Its text, or the number of its row."""
    force: bool = False
    """Also where the model has an embedding of its own."""


@dataclass(frozen=True)
class TokenizerSettings:
    """The vocabulary of the merged model."""

    source: str
    """union, intersection, base, or a model."""
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    path: KeyPath = ()


@dataclass(frozen=True)
class Reset:
    """A part of the merged tensors put back to the base's."""

    fraction: float
    unit: str
    """category: of each layer's attention matrices, feed-forward matrices and vectors that share; tensor: of all tensors."""


@dataclass(frozen=True)
class MergeRecipe:
    """What is to be merged, and how."""

    method: MergeMethod
    modules: tuple[Module, ...]
    parameters: Parameters
    base: str | None
    dtype: str | None
    """safetensors' name of what is written; None is what each tensor is in the base or first model."""
    tokenizer: TokenizerSettings | None
    chat_template: str | None
    reset: Reset | None
    seed: int
    document: Document
    path: Path
    text: str

    def where(self, path: KeyPath) -> str:
        """A place in the file, for an error."""
        return where(path, self.document.place(path))

    def references(self) -> list[str]:
        """Every model that is named, in order, once."""
        names = [] if self.base is None else [self.base]
        for module in self.modules:
            for piece in module.slices:
                names += [] if piece.base is None else [piece.base]
                names += [part.model for part in piece.parts]
        if self.tokenizer is not None:
            names += [self.tokenizer.source] if self.tokenizer.source not in ("union", "intersection", "base") else []
            names += [token.model for token in self.tokenizer.tokens.values() if token.model is not None]
        return list(dict.fromkeys(names))

    def settings(self) -> Iterator[Setting]:
        """Every parameter that is set anywhere."""
        yield from self.parameters.values()
        for module in self.modules:
            yield from module.parameters.values()
            for piece in module.slices:
                yield from piece.parameters.values()
                for part in piece.parts:
                    yield from part.parameters.values()


_TOP = (
    *("merge_method", "models", "slices", "modules", "dus", "base_model", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "reset", "seed"),
)
_MAX_MULTIPLE = 2**16
_TEMPLATES = ("auto", "alpaca", "chatml", "llama3", "mistral", "exaone")


def load_merge_recipe(path: Path) -> MergeRecipe:
    """The merge recipe at `path`.

    Raises:
        RecipeError: it cannot be read, or something in it is wrong; names every problem with its line.
    """
    try:
        text = decode(path.read_bytes())
        document = parse(text)
    except FileNotFoundError:
        near = [str(other) for pattern in ("*.yaml", "*.yml") for other in sorted(path.parent.glob(pattern))]
        raise RecipeError(f"merge recipe `{path}` does not exist", hint=did_you_mean(str(path), near)) from None
    except OSError as error:
        raise RecipeError(f"merge recipe `{path}` cannot be read: {(error.strerror or str(error)).lower()}") from None
    except YamlError as error:
        hint = "a merge recipe begins with `merge_method: ...`" if "document" in error.problem.what else error.problem.hint
        raise recipe_error(path, [Problem(error.problem.where, error.problem.what, hint)]) from None
    reader = _Reader(document, path)
    recipe = reader.recipe(text)
    if recipe is None or reader.problems or document.problems:
        found = [*document.problems, *reader.problems]
        raise recipe_error(path, [problem for _, problem in sorted(found, key=lambda item: (item[0].line, item[0].column))])
    return recipe


def recipe_error(path: Path, problems: list[Problem]) -> RecipeError:
    """The error that lists what is wrong with the recipe at `path`."""
    return RecipeError(f"merge recipe `{path}` has {len(problems)} problem{'s' if len(problems) != 1 else ''}", problems)


class _Reader:
    """Turns the document into a recipe, and collects what is wrong on the way."""

    def __init__(self, document: Document, path: Path) -> None:
        self.document, self.path = document, path
        self.problems: list[tuple[Place, Problem]] = []
        self.method: MergeMethod | None = None

    def wrong(self, path: KeyPath, what: str, hint: str | None = None) -> None:
        place = self.document.place(path) or Place(1, 1)
        self.problems.append((place, Problem(where(path, place), what, hint)))

    def recipe(self, text: str) -> MergeRecipe | None:
        data = self.document.data
        self.keys(data, (), _TOP)
        self.method = self._method(data)
        written = [key for key in ("models", "slices", "modules", "dus") if key in data]
        if len(written) != 1:
            found = f"found {' and '.join(f'`{key}`' for key in written)}" if written else "there are no models"
            self.wrong((written[1],) if written else (), f"{found}, allowed: one of `models`, `slices`, `modules`, `dus`")
        modules = self._modules(data, written[0]) if written else ()
        base = self.model(data, "base_model", ())
        parameters = self.parameters(data, (), shared=True, per_model=True)
        dtype = self._dtype(data)
        tokenizer = self._tokenizer(data)
        template = self._template(data)
        reset = self._reset(data)
        seed = data.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool):
            self.wrong(("seed",), f"found {describe(seed)}, allowed: a whole number")
            seed = 0
        if self.method is None:
            return None
        self._needs_base(base, modules, reset)
        return MergeRecipe(
            self.method, modules, parameters, base, dtype, tokenizer, template, reset, seed, self.document, self.path, text
        )  # fmt: skip

    def _method(self, data: dict[str, Any]) -> MergeMethod | None:
        name = data.get("merge_method")
        if name is None:
            self.wrong((), "missing key `merge_method`", f"methods: {', '.join(METHODS)}")
        elif not isinstance(name, str):
            self.wrong(("merge_method",), f"found {describe(name)}, allowed: the name of a method")
        elif name not in METHODS:
            hint = did_you_mean(name, list(METHODS)) or f"methods: {', '.join(METHODS)}"
            self.wrong(("merge_method",), f"unknown method `{name}`", hint)
        else:
            return METHODS[name]
        return None

    def _needs_base(self, base: str | None, modules: tuple[Module, ...], reset: Reset | None) -> None:
        assert self.method is not None
        has_base = base is not None or (modules and all(piece.base for module in modules for piece in module.slices))
        if self.method.base == "required" and not has_base:
            self.wrong(("merge_method",), f"`{self.method.name}` compares models with a base, and there is none", "add `base_model: ...`")
        if reset is not None and base is None:
            self.wrong(("reset",), "there is no base to go back to", "add `base_model: ...`")

    def keys(self, data: Mapping[str, Any], path: KeyPath, allowed: tuple[str, ...]) -> None:
        """Every key that is not `allowed` is a problem."""
        for key in data:
            if key not in allowed:
                self.wrong((*path, key), "unknown key", did_you_mean(key, allowed) or f"keys here: {', '.join(allowed)}")

    def text(self, data: Mapping[str, Any], key: str, path: KeyPath) -> str | None:
        """The text under `key`."""
        value = data.get(key)
        if value is None or (isinstance(value, str) and value.strip()):
            return value
        self.wrong((*path, key), f"found {describe(value)}, allowed: text", "put it in quotes" if isinstance(value, int | float) else None)
        return None

    def model(self, data: Mapping[str, Any], key: str, path: KeyPath) -> str | None:
        """The model under `key`: a text, or mergekit's long form."""
        value = data.get(key)
        if not isinstance(value, dict):
            return self.text(data, key, path)
        name, faults = short_form(value)
        for inner, what, hint in faults:
            self.wrong((*path, key, *inner), what, hint)
        return name

    def mapping(self, value: Any, path: KeyPath) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        self.wrong(path, f"found {describe(value)}, allowed: a mapping")
        return {}

    def list_of(self, data: Mapping[str, Any], key: str, path: KeyPath) -> list[Any]:
        """The entries under `key`, at least one."""
        value = data.get(key)
        if isinstance(value, list) and value:
            return value
        self.wrong((*path, key), f"found {describe(value)}, allowed: a list with at least 1 entry", "begin every entry with `- `")
        return []

    def _modules(self, data: dict[str, Any], key: str) -> tuple[Module, ...]:
        if key == "modules":
            modules = []
            if data["modules"] == {}:
                self.wrong(("modules",), "there are no models", "modules: {NAME: {models: [...]}, default: {models: [...]}}")
            for name, value in self.mapping(data["modules"], ("modules",)).items():
                path: KeyPath = ("modules", name)
                inner = self.mapping(value, path)
                self.keys(inner, path, ("models", "slices", "parameters"))
                if ("models" in inner) == ("slices" in inner):
                    self.wrong(path, "found both or none of `models` and `slices`, allowed: one")
                    continue
                modules.append(self._module(inner, "models" if "models" in inner else "slices", path, name))
            return tuple(modules)
        return (self._module(data, key, (), None),)

    def _module(self, data: dict[str, Any], key: str, path: KeyPath, name: str | None) -> Module:
        parameters = self.parameters(data, path, shared=True, per_model=True) if path else {}
        name = None if name == "default" else name
        if key == "dus":
            return Module(name, self._depth_up_scaling(data["dus"]), parameters, False)
        if key == "models":
            parts = tuple(self._part(value, (*path, key, index), False) for index, value in enumerate(self.list_of(data, key, path)))
            return Module(name, (Slice(parts, {}, (*path, key)),), parameters, True)
        slices = tuple(self._slice(value, (*path, key, index)) for index, value in enumerate(self.list_of(data, key, path)))
        return Module(name, slices, parameters, False)

    def _slice(self, value: Any, path: KeyPath) -> Slice:
        data = self.mapping(value, path)
        self.keys(data, path, ("sources", "base_model", "parameters", "residual_weight"))
        if "residual_weight" in data:
            self.wrong((*path, "residual_weight"), "mergekit reads this key and never uses it", "remove it")
        parts = tuple(self._part(part, (*path, "sources", index), True) for index, part in enumerate(self.list_of(data, "sources", path)))
        lengths = {part.layers[1] - part.layers[0] for part in parts if part.layers is not None}
        if len(lengths) > 1:
            self.wrong((*path, "sources"), f"the layer ranges have {', '.join(map(str, sorted(lengths)))} layers, allowed: all as many")
        return Slice(parts, self.parameters(data, path, shared=True, per_model=True), path, self.model(data, "base_model", path))

    def _part(self, value: Any, path: KeyPath, is_sliced: bool) -> Part:
        data = {"model": value} if isinstance(value, str) and not is_sliced else self.mapping(value, path)
        self.keys(data, path, ("model", "layer_range", "parameters", "statistics") if is_sliced else ("model", "parameters", "statistics"))
        if "model" not in data:
            self.wrong(path, "missing key `model`", "a folder, builtin:NAME, or a hub id")
        layers = self._layers(data, "layer_range", path) if is_sliced else None
        statistics = self.text(data, "statistics", path)
        if statistics is not None and self.method is not None and self.method.statistics is None:
            self.wrong((*path, "statistics"), f"`{self.method.name}` needs no statistics", "remove it")
        if statistics is None and self.method is not None and self.method.statistics is not None:
            self.wrong(path, f"`{self.method.name}` needs statistics of every model", "add `statistics: FILE.safetensors`")
        parameters = self.parameters(data, path, shared=False, per_model=True)
        return Part(self.model(data, "model", path) or "", parameters, path, layers, statistics)

    def _layers(self, data: Mapping[str, Any], key: str, path: KeyPath) -> tuple[int, int] | None:
        value = data.get(key)
        is_pair = isinstance(value, list) and len(value) == 2 and all(isinstance(end, int) and not isinstance(end, bool) for end in value)
        if is_pair and isinstance(value, list) and 0 <= value[0] < value[1]:
            return value[0], value[1]
        what = f"missing key `{key}`" if value is None else f"found {value if isinstance(value, list) else describe(value)}"
        self.wrong((*path, key) if value is not None else path, f"{what}, allowed: [first, last], last not included, first below last")
        return None

    def _depth_up_scaling(self, value: Any) -> tuple[Slice, ...]:
        """SOLAR's depth up-scaling: the model without its last `drop` layers, then the model without its first `drop`."""
        path: KeyPath = ("dus",)
        data = self.mapping(value, path)
        self.keys(data, path, ("model", "drop"))
        drop, model = data.get("drop"), self.model(data, "model", path)
        if not isinstance(drop, int) or isinstance(drop, bool) or drop < 1:
            self.wrong(
                (*path, "drop") if "drop" in data else path, f"found {describe(drop)} as `drop`, allowed: a whole number, at least 1"
            )
            drop = 1
        if model is None:
            self.wrong(path, "missing key `model`")
        if self.method is not None and self.method.name != "passthrough":
            self.wrong(path, f"`dus` copies layers, and `{self.method.name}` does not", "write `merge_method: passthrough`")
        ranges = ((0, -drop), (drop, 0))
        return tuple(Slice((Part(model or "", {}, path, layers),), {}, path) for layers in ranges)

    def parameters(self, data: Mapping[str, Any], path: KeyPath, *, shared: bool, per_model: bool) -> Parameters:
        """The settings under `parameters`.

        Args:
            shared: settings that are one for all models may stand here.
            per_model: settings that each model has its own of may stand here.
        """
        if data.get("parameters") is None or self.method is None:
            return {}
        here = (*path, "parameters")
        found = {}
        for name, value in self.mapping(data["parameters"], here).items():
            parameter = self.method.parameter(name)
            if parameter is None:
                known = [known.name for known in self.method.parameters]
                homes = [other.name for other in METHODS.values() if other.parameter(name)]
                others = f"`{name}` belongs to {', '.join(homes[:6])}" if homes else None
                hint = did_you_mean(name, known) or others or f"parameters of `{self.method.name}`: {', '.join(known) or 'none'}"
                self.wrong((*here, name), "unknown parameter", hint)
            elif not shared and not parameter.per_model:
                self.wrong((*here, name), f"`{name}` is one for all models", "move it to `parameters` at the top level or of a slice")
            else:
                found[name] = Setting((*here, name), self._entries(value, (*here, name), name))
        return found

    def _entries(self, value: Any, path: KeyPath, name: str) -> tuple[Conditional, ...]:
        if isinstance(value, dict):
            return (self._conditional(value, path, name),)
        if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            entries = []
            for index, entry in enumerate(value):
                data = entry if isinstance(entry, dict) else {"value": entry}
                entries.append(self._conditional(data, (*path, index), name))
            return tuple(entries)
        return (Conditional(self._points(value, path, name), path),)

    def _conditional(self, data: dict[str, Any], path: KeyPath, name: str) -> Conditional:
        self.keys(data, path, ("value", "filter", "regex", "layers"))
        if "value" not in data:
            self.wrong(path, "missing key `value`")
        points = self._points(data.get("value"), (*path, "value"), name) if "value" in data else (0,)
        text = self.text(data, "filter", path)
        pattern = None
        if (regex := self.text(data, "regex", path)) is not None:
            try:
                pattern = re.compile(regex)
            except re.error as error:
                self.wrong((*path, "regex"), f"`{regex}` is no regular expression: {error}")
        layers = self._layers(data, "layers", path) if "layers" in data else None
        return Conditional(points, path, None if text == "*" else text, pattern, layers)

    def _points(self, value: Any, path: KeyPath, name: str) -> tuple[Any, ...]:
        assert self.method is not None
        parameter = self.method.parameter(name)
        assert parameter is not None
        points = tuple(value) if isinstance(value, list) else (value,)
        if not points:
            self.wrong(path, "found an empty list, allowed: a value, or the points of a gradient")
        for index, point in enumerate(points):
            if (fault := parameter.fault(point)) is not None:
                self.wrong((*path, index) if isinstance(value, list) else path, fault)
        return tuple(map(parameter.taken, points)) or (0,)

    def _dtype(self, data: dict[str, Any]) -> str | None:
        for key in ("dtype", "out_dtype"):
            value = data.get(key)
            computed_only = ("float64",) if key == "dtype" else ()
            if value is not None and value not in (*DTYPES, *computed_only):
                hint = did_you_mean(str(value), list(DTYPES)) or "tensors are always computed in float32, and rounded once"
                self.wrong((key,), f"found {describe(value)}, allowed: {', '.join(DTYPES)}", hint)
        return DTYPES.get(str(data.get("out_dtype") or data.get("dtype")))

    def _tokenizer(self, data: dict[str, Any]) -> TokenizerSettings | None:
        if "tokenizer" in data and "tokenizer_source" in data:
            self.wrong(("tokenizer_source",), "found `tokenizer` and `tokenizer_source`, allowed: one of them", "keep `tokenizer`")
        if "tokenizer" not in data:
            source = self.text(data, "tokenizer_source", ())
            return None if source is None else TokenizerSettings(source, path=("tokenizer_source",))
        path: KeyPath = ("tokenizer",)
        section = self.mapping(data["tokenizer"], path)
        self.keys(section, path, ("source", "tokens", "pad_to_multiple_of"))
        multiple = section.get("pad_to_multiple_of")
        if multiple is not None and (not isinstance(multiple, int) or isinstance(multiple, bool) or not 1 <= multiple <= _MAX_MULTIPLE):
            self.wrong((*path, "pad_to_multiple_of"), f"found {describe(multiple)}, allowed: a whole number from 1 to {_MAX_MULTIPLE}")
            multiple = None
        tokens = {}
        for token, value in self.mapping(section.get("tokens") or {}, (*path, "tokens")).items():
            tokens[token] = self._token(value, (*path, "tokens", token))
        return TokenizerSettings(self.text(section, "source", path) or "union", tokens, multiple, path)

    def _token(self, value: Any, path: KeyPath) -> TokenSource:
        data = self.mapping(value, path)
        if data is not value:
            return TokenSource("zero")
        self.keys(data, path, ("source", "force"))
        force = data.get("force", False)
        if not isinstance(force, bool):
            self.wrong((*path, "force"), f"found {describe(force)}, allowed: true or false")
        source = data.get("source")
        if isinstance(source, str):
            return TokenSource("model", source, None, bool(force))
        inner = self.mapping(source, (*path, "source"))
        if inner is not source:
            return TokenSource("zero")
        self.keys(inner, (*path, "source"), ("kind", "model", "token", "token_id"))
        kind = inner.get("kind", "model_token")
        if kind not in ("zero", "model_token"):
            self.wrong((*path, "source", "kind"), f"unknown kind `{kind}`", "kinds: zero, model_token")
        model = self.model(inner, "model", (*path, "source"))
        token, number = self.text(inner, "token", (*path, "source")), inner.get("token_id")
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
            self.wrong((*path, "source", "token_id"), f"found {describe(number)}, allowed: a whole number, at least 0")
        elif kind == "model_token" and (model is None or (inner.get("token") is None) == (number is None)):
            self.wrong((*path, "source"), "found a `model_token` without `model`, or not with one of `token` and `token_id`")
        return TokenSource(str(kind), model, number if token is None else token, bool(force))

    def _template(self, data: dict[str, Any]) -> str | None:
        template = self.text(data, "chat_template", ())
        if template is None or template in _TEMPLATES:
            return template
        if "{" not in template:
            hint = did_you_mean(template, _TEMPLATES) or "or the Jinja text itself"
            self.wrong(("chat_template",), f"unknown chat template `{template}`", hint)
            return None
        from ftcli.models.jinja import compile_template

        try:
            compile_template(template)
        except RequestError as error:
            line = error.problems[0].where.rpartition(": ")[2]
            self.wrong(("chat_template",), f"the template is no valid Jinja: {error.problems[0].what} ({line})")
        return template

    def _reset(self, data: dict[str, Any]) -> Reset | None:
        if data.get("reset") is None:
            return None
        section = self.mapping(data["reset"], ("reset",))
        self.keys(section, ("reset",), ("fraction", "unit"))
        fraction, unit = section.get("fraction"), section.get("unit", "category")
        if not isinstance(fraction, int | float) or isinstance(fraction, bool) or not 0 <= fraction <= 1:
            self.wrong(("reset", "fraction"), f"found {describe(fraction)}, allowed: a number from 0 to 1")
            fraction = 0.0
        if unit not in ("category", "tensor"):
            self.wrong(("reset", "unit"), f"found {describe(unit)}, allowed: category or tensor")
        return Reset(float(fraction), str(unit))
