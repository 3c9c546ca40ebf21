"""Growing a base model before training: the new model is made from its own new configuration, as a reload would make it.

A growth says which configuration the larger model has and where each of its tensors comes from; the model is then built from that
configuration and takes the tensors. So the per-layer lists of the configuration, buffers and layer numbers cannot disagree with the
weights, and what is saved is an ordinary model of its class.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftcli.errors import Problem, RequestError
from ftcli.files import write_json
from ftcli.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
GROWN_ATTRIBUTE = "ftcli_grown"
GROWN_FILE = "grown.json"
# Logits of a grown model may differ by this much of the largest logit; by dtype, for sums in another order.
_ROUNDING = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True, slots=True, eq=False)
class Grown:
    """A larger model, and what of it is new."""

    model: PreTrainedModel
    parameters: frozenset[str]
    """Names of the parameters that are new or hold something new."""
    detail: str
    """What was done, in a few words."""


class Growth(Spec, ABC):
    """How a base model is made larger before training."""

    keeps_outputs: ClassVar[bool] = True
    """The larger model computes what the base does."""

    def require_fit(self, fields: Mapping[str, Any]) -> None:
        """Refuse what a configuration's `fields` alone tell, before anything is loaded.

        Raises:
            RequestError: the settings do not fit the model.
        """

    @abstractmethod
    def grown(self, model: PreTrainedModel, seed: int) -> Grown:
        """The larger model; `model` is used up.

        Args:
            seed: of whatever is drawn.

        Raises:
            RequestError: the settings do not fit the model.
        """


def require_growth_fits(folder: Path, growth: Growth) -> None:
    """Refuse a growth that the configuration in `folder` cannot take; what only the weights tell is found when they are loaded.

    Raises:
        RequestError: the settings do not fit the model.
    """
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    growth.require_fit(fields.get("text_config", fields))


def num_layers_of(fields: Mapping[str, Any]) -> int | None:
    """Layers that a configuration says; None where it does not say, or by another name."""
    found = [fields[name] for name in _LAYERS if isinstance(fields.get(name), int)]
    return found[0] if found else None


def grow(model: PreTrainedModel, growth: Growth, seed: int) -> PreTrainedModel:
    """`model` grown, with the proof that its logits are what they were (measured only, where the growth changes them).

    Raises:
        RequestError: the settings do not fit the model, or its outputs changed where they must not.
    """
    from ftcli.models.changes import Change, changes_of, largest_difference, note_change, probe_logits
    from ftcli.models.quantisation import is_quantised

    if any(is_quantised(module) for module in model.modules()):
        raise unfit("", "quantised weights cannot be grown", "kind: full or freeze, or grow first and name the result under `model.base`")
    embedding: Any = model.get_input_embeddings()
    num_tokens = len(embedding.weight)
    before = probe_logits(model, num_tokens)
    earlier = changes_of(model)
    found = growth.grown(model, seed)
    difference, scale = largest_difference(before, probe_logits(found.model, num_tokens))
    allowed = _ROUNDING.get(str(found.model.dtype).removeprefix("torch."), 1e-5) * scale
    if growth.keeps_outputs and difference > allowed:
        kind = getattr(growth, "kind", "")
        what = f"`{kind}` changes what a `{model.config.model_type}` computes (logits by {difference:.1e}), and it must not"
        raise unfit("kind", what, "another kind: `blocks` suits most architectures")
    found.model.ftcli_changes = earlier  # type: ignore[assignment]
    kept = "logits unchanged" if growth.keeps_outputs else "logits change"
    note_change(found.model, Change("growth", f"{found.detail}; {kept}: largest difference {difference:.1e}"))
    setattr(found.model, GROWN_ATTRIBUTE, found.parameters)
    return found.model


def grown_parameters(model: Any) -> frozenset[str]:
    """Names of the parameters that growing added; empty for a model that was not grown."""
    found: frozenset[str] = getattr(model, GROWN_ATTRIBUTE, frozenset())
    return found


def note_grown(model: Any, folder: Path) -> None:
    """Keep beside the weights in `folder` what of the model was grown, for runs that begin with it; nothing where nothing was."""
    if names := grown_parameters(model):
        write_json(folder / GROWN_FILE, {"parameters": sorted(names)})


def find_grown(model: Any, folder: Path) -> None:
    """Let the model that was loaded from `folder` know what of it was grown in an earlier run."""
    path = folder / GROWN_FILE
    if path.is_file():
        names = json.loads(path.read_text(encoding="utf-8"))["parameters"]
        setattr(model, GROWN_ATTRIBUTE, frozenset(names).intersection(name for name, _ in model.named_parameters()))


def require_grown(folder: Path) -> None:
    """Refuse the weights in `folder` where nothing says that something in them was grown.

    Raises:
        RequestError: nothing does.
    """
    if not (folder / GROWN_FILE).is_file():
        problem = Problem("method.grown", "the base was not grown", "`model.grow` says how")
        raise RequestError("the method does not fit the model", [problem])


def unfit(field: str, what: str, hint: str | None = None) -> RequestError:
    """The error for a growth that the model cannot take."""
    return RequestError("the model cannot be grown so", [Problem(f"model.grow.{field}".rstrip("."), what, hint)])


def rebuilt(
    model: PreTrainedModel, config: PretrainedConfig, tensors: Mapping[str, Tensor], model_class: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """A model of `config` with `tensors` as its weights, and the rest of `model`: device, dtype, attention, generation settings.

    Raises:
        RequestError: the tensors are not those that the configuration asks for.
    """
    import torch
    from transformers.initialization import no_init_weights

    config._name_or_path = model.config._name_or_path
    # Memory of the first weights is never touched: they are replaced by `tensors`.
    with no_init_weights():
        result: Any = (model_class or type(model))._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    if model.device.type != "cpu":
        result.to(model.device)
    expected = dict(result.state_dict())
    wrong = sorted(expected.keys() ^ tensors.keys()) or [n for n in expected if expected[n].shape != tensors[n].shape]
    if wrong:
        raise unfit("kind", f"a `{config.model_type}` of this configuration holds other tensors: {', '.join(wrong[:5])}")
    with torch.no_grad():
        result.load_state_dict(dict(tensors), assign=True)
    result.tie_weights()
    result.generation_config = model.generation_config
    for name in ("fresh_modules", "ftcli_first_added"):
        if hasattr(model, name):
            setattr(result, name, getattr(model, name))
    return result.eval()  # type: ignore[no-any-return]


def restacked(
    model: PreTrainedModel, origins: Sequence[int], changed: Mapping[int, Mapping[str, Tensor]] | None = None
) -> tuple[PreTrainedModel, str]:
    """The model with its layers in another order or number, and the name of their stack.

    Args:
        origins: for each layer of the new model, which layer of `model` it is.
        changed: for layers of the new model, tensors by the rest of their names that take the place of the origin's.

    Raises:
        RequestError: the configuration cannot say where its layers went.
    """
    from ftcli.methods.parts import decoder_layers, layer_of
    from ftcli.models.layer_lists import merged_layers

    stack, _ = decoder_layers(model)
    fields = text_config(model.config).to_dict()
    merged, faults = merged_layers(fields, [(fields, origin) for origin in origins])
    if faults:
        raise RequestError("the model cannot be grown so", [Problem("model.grow", fault) for fault in faults])
    tensors: dict[str, Tensor] = {}
    by_layer: dict[int, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        layer = layer_of(name, stack)
        if layer is None:
            tensors[name] = tensor
        else:
            by_layer.setdefault(layer, {})[name.removeprefix(f"{stack}.{layer}.")] = tensor
    seen: set[int] = set()
    for index, origin in enumerate(origins):
        own = {**by_layer[origin], **(changed or {}).get(index, {})}
        # Each layer has weights of its own: two that share memory would train as one.
        tensors |= {f"{stack}.{index}.{rest}": tensor.clone() if origin in seen else tensor for rest, tensor in own.items()}
        seen.add(origin)
    return rebuilt(model, with_text_fields(model.config, merged), tensors), stack


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that tells of the language model."""
    return config.get_text_config()


def with_text_fields(config: PretrainedConfig, fields: Mapping[str, Any]) -> PretrainedConfig:
    """A copy of `config` whose part for the language model has these fields."""
    import copy

    text = text_config(config)
    made = type(text).from_dict(dict(fields))
    if text is config:
        return made
    result = copy.deepcopy(config)
    name = next(name for name, value in vars(config).items() if value is text)
    setattr(result, name, made)
    return result
