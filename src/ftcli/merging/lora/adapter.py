"""A LoRA adapter in PEFT's layout as mathematics: for each module the factors of what it adds, without torch and without the base.

PEFT's files mean: W + s * B @ A with s = alpha / r, or alpha / sqrt(r) for rsLoRA; `rank_pattern` and `alpha_pattern` change r and
alpha for some modules; an embedding's change is (B @ A) transposed; Conv1D layers hold W transposed; PiSSA and OLoRA take a part of W off
before; DoRA scales every row of W + s * B @ A to a learnt length; `modules_to_save` are whole modules in place of the base's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ftcli.errors import Problem, RequestError
from ftcli.merging import layers
from ftcli.merging.adapters import is_stored_transposed, scaling, wrong_scales
from ftcli.merging.documents import read_object
from ftcli.merging.lora.stored import StoredTensors, name_in_checkpoint, stored_file
from ftcli.merging.numbers import Array
from ftcli.models.adapter_start import HINT, Start, lost_start, start_factors, start_of
from ftcli.models.added_rows import needs_another_base

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_LINEAR, _EMBEDDING = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
_MAGNITUDE = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
# What changes the formula in ways that no sum of products can follow.
_OTHER_FORMULAS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config"),
    *("target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """What an adapter adds to one module: scaling * B @ A, before DoRA's lengths."""

    a: Array
    """``(r, n)``"""
    b: Array
    """``(m, r)``"""
    scaling: float
    magnitude: Array | None
    """``(m,)`` DoRA's row lengths."""


@dataclass(frozen=True)
class Adapter:
    """An adapter folder."""

    name: str
    """As the recipe says it."""
    folder: Path
    config: dict[str, Any]
    tensors: StoredTensors

    @property
    def base(self) -> str | None:
        """The model it was trained on, as it names it."""
        return self.config.get("base_model_name_or_path")

    @property
    def kind(self) -> str:
        """PEFT's type, in lower case."""
        return str(self.config.get("peft_type")).lower()

    @cached_property
    def modules(self) -> dict[str, bool]:
        """Every module with factors by name, and whether it is an embedding."""
        found = {}
        for name in sorted(self.tensors):
            for suffix, is_embedding in ((_LINEAR[0], False), (_EMBEDDING[0], True)):
                if name.endswith(suffix):
                    found[name.removeprefix(PREFIX).removesuffix(suffix)] = is_embedding
        return found

    @cached_property
    def full_tensors(self) -> dict[str, str]:
        """The tensors of `modules_to_save` by the base's names, and their names in the file."""
        known = {f"{PREFIX}{module}{suffix}" for module in self.modules for suffix in (*_LINEAR, *_EMBEDDING, *_MAGNITUDE)}
        # PEFT stores a copy of the base's own embedding or head beside its factors
        known |= {f"{PREFIX}{module}.base_layer.weight" for module in self.modules}
        return {name.removeprefix(PREFIX): name for name in sorted(self.tensors) if name not in known}

    @cached_property
    def saved_modules(self) -> tuple[str, ...]:
        """Ends of the names of the modules that the file holds whole: those of `modules_to_save`, and what PEFT keeps tied to them."""
        noted = tuple(self.config.get("modules_to_save") or ())
        tied = self.full_tensors if self.config.get("ensure_weight_tying") else ()
        return noted + tuple(name.rpartition(".")[0] for name in tied if layers.is_head(name) or layers.is_embedding(name))

    def is_dora(self, module: str) -> bool:
        return any(f"{PREFIX}{module}{suffix}" in self.tensors for suffix in _MAGNITUDE)

    def start(self, module: str) -> Start | None:
        """What of a module's own weight is taken off it."""
        return None if self.modules[module] else start_of(self.config)

    def needs_base(self, module: str) -> bool:
        """Does its change of a module depend on the base's weight?"""
        return self.is_dora(module) or self.start(module) is not None

    def shape(self, module: str) -> tuple[int, int]:
        """``(m, n)`` of what is added to a module."""
        first, second = _EMBEDDING if self.modules[module] else _LINEAR
        return self.tensors.shape(PREFIX + module + second)[0], self.tensors.shape(PREFIX + module + first)[1]

    def rank(self, module: str) -> int:
        """Of what it adds: a part of the weight that is taken off has the rank of what was trained."""
        own = self.tensors.shape(PREFIX + module + (_EMBEDDING if self.modules[module] else _LINEAR)[0])[0]
        return own if self.start(module) is None else 2 * own

    def factors(self, module: str, base: StoredTensors | None) -> Factors:
        """Reads them.

        Args:
            base: the base model's weights; only for modules that need them.

        Raises:
            RequestError: their numbers are not finite.
        """
        first, second = _EMBEDDING if self.modules[module] else _LINEAR
        a, b = self.tensors[PREFIX + module + first], self.tensors[PREFIX + module + second]
        names = [PREFIX + module + suffix for suffix in _MAGNITUDE]
        magnitude = next((self.tensors[name] for name in names if name in self.tensors), None)
        if not all(np.isfinite(array).all() for array in (a, b, *([] if magnitude is None else [magnitude]))):
            raise RequestError("the adapter is not finite", [Problem(self.name, f"the factors of `{module}` hold NaN or infinite numbers")])
        scale, start = scaling(self.config, module, len(a)), self.start(module)
        if start is None:
            return Factors(a, b, scale, magnitude)
        weight, is_transposed = self._stored_weight(module, base)
        left, right = start_factors(start, weight, len(a), scale)
        left, right = (right.T, left.T) if is_transposed else (left, right)
        return Factors(np.concatenate([a, right]), np.concatenate([b * np.float32(scale), -left], axis=1), 1.0, magnitude)

    def _stored_weight(self, module: str, base: StoredTensors | None) -> tuple[Array, bool]:
        """The base's weight of a module, and whether it is stored as (in, out)."""
        assert base is not None, f"what is added to `{module}` depends on the base"
        weight = base_tensor(base, f"{module}.weight")
        return weight, is_stored_transposed(self.config, base.config, module, weight.shape, self.shape(module))

    def delta(self, module: str, base: StoredTensors | None) -> Array:
        """``(m, n)`` float32: what it truly adds to the weight of a module.

        Args:
            base: the base model's weights; only for modules that need them.
        """
        factors = self.factors(module, base)
        change: Array = (factors.b @ factors.a) * np.float32(factors.scaling)
        if factors.magnitude is None:
            return change
        weight, is_transposed = self._stored_weight(module, base)
        weight = weight.T if is_transposed else weight
        merged = weight + change
        lengths = np.sqrt(np.einsum("mn,mn->m", merged, merged, dtype=np.float64))
        return np.asarray(merged * (factors.magnitude / lengths).astype(np.float32)[:, None] - weight, np.float32)

    def problems(self) -> Iterator[Problem]:
        """Why it cannot be computed with."""
        where = self.name
        if self.kind != "lora":
            yield Problem(where, f"is a `{self.kind}` adapter, not LoRA", "`merge_method: adapter_average` averages other kinds")
            return
        if (lost := lost_start(self.config)) is not None:
            yield Problem(where, lost, HINT)
        for key in _OTHER_FORMULAS:
            if self.config.get(key):
                yield Problem(where, f"uses `{key}`, whose change of the model is no product of two factors")
        if self.config.get("bias", "none") != "none":
            yield Problem(where, f"trains biases (`bias: {self.config['bias']}`), of which PEFT's file does not hold all")
        for what in wrong_scales(self.config):
            yield Problem(where, what, "PEFT writes numbers here: fetch or write the file again")
        strangers = [name for name in self.full_tensors if not _in_modules(name, self.saved_modules)]
        if strangers:
            more = f", ... and {len(strangers) - 3} more" if len(strangers) > 3 else ""
            yield Problem(where, f"holds tensors that are no factors and in no `modules_to_save`: {', '.join(strangers[:3])}{more}")
        if not self.modules and not self.full_tensors:
            yield Problem(where, "has no tensors")
        yield from self._factor_problems()

    def _factor_problems(self) -> Iterator[Problem]:
        for module, is_embedding in self.modules.items():
            first, second = _EMBEDDING if is_embedding else _LINEAR
            if PREFIX + module + second not in self.tensors:
                yield Problem(self.name, f"`{module}` has A and no B")
                continue
            shapes = self.tensors.shape(PREFIX + module + first), self.tensors.shape(PREFIX + module + second)
            if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][0] != shapes[1][1] or shapes[0][0] == 0:
                yield Problem(self.name, f"`{module}` has factors of shapes {shapes[0]} and {shapes[1]}", "linear layers and embeddings")
            if is_embedding and self.is_dora(module):
                yield Problem(self.name, f"`{module}` is an embedding with DoRA", "linear layers")


def open_adapter(name: str, folder: Path) -> Adapter:
    """The adapter in `folder`, or of the run whose folder it is; only headers and JSON are read.

    Raises:
        RequestError: there is none, or it cannot be read.
    """
    place = next((place for place in (folder, folder / "adapter") if (place / CONFIG_FILE).is_file()), None)
    if place is None:
        what = f"has no `{CONFIG_FILE}`" if folder.is_dir() else "is no folder"
        raise RequestError("the adapter cannot be read", [Problem(name, what, "an adapter's folder in PEFT's layout, or a run of one")])
    config = read_object(place / CONFIG_FILE, name)
    if not (place / WEIGHTS_FILE).is_file():
        problem = Problem(name, f"has no `{WEIGHTS_FILE}`", "weights are read from safetensors only")
        raise RequestError("the adapter cannot be read", [problem])
    if (needed := needs_another_base(place)) is not None:
        raise RequestError("the adapter cannot be merged with others", [Problem(name, needed, "`ftcli merge` of its run makes a model")])
    return Adapter(name, place, config, stored_file(place / WEIGHTS_FILE))


def base_tensor(base: StoredTensors, name: str) -> Array:
    """The tensor that the base has under the name `name`.

    Raises:
        RequestError: it has none.
    """
    found = name_in_checkpoint(base, name)
    if found is None and name.startswith("lm_head."):
        # a tied head is stored as the embedding
        embeddings = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
        found = next((stored for stored in base if stored.endswith(embeddings)), None)
    if found is None:
        problem = Problem(name, "is not in the base's weights", "give the base it was trained on")
        raise RequestError("adapter and base do not fit", [problem])
    return base[found]


def _in_modules(tensor: str, modules: tuple[str, ...]) -> bool:
    """Is the tensor one of a module whose name ends so? PEFT compares letters, not parts: `norm` is every `input_layernorm`, too."""
    parts = tensor.split(".")
    return any(".".join(parts[:count]).endswith(modules) for count in range(1, len(parts)))
