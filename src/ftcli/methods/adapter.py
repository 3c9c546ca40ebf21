"""A PEFT LoRA adapter on a model: its layers, its frozen start, its files, and its merge into plain weights.

An initialisation that takes A and B from the weight itself must not change what the model computes. PEFT subtracts the initial
product from the base, which rounds (in bfloat16 far too much) and cannot be done to a quantised weight. Here the initial factors
stay beside the trained ones as a frozen, negative part: A = [trained; initial], B = [trained, -initial]. The base is never
touched, the start is the identity, and the adapter that is saved (of twice the rank) fits the original base exactly.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ftcli.errors import Problem, RequestError
from ftcli.models.adapter_start import HINT, lost_start, start_of
from ftcli.models.added_rows import ROWS_FILE, TOKEN_ADAPTER, whole_in_adapter
from ftcli.models.load import settle_tying
from ftcli.models.quantisation import dequantised_weight, is_quantised, requantised_weight
from ftcli.models.quiet import quiet_libraries

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

MergeTarget = Literal["dequantised", "original", "requantised"]
ADAPTER = "default"
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_LISTED = 10


class Joined(nn.Module):
    """The trained factor with a frozen one beside it."""

    def __init__(self, frozen: Tensor, dim: int) -> None:
        super().__init__()
        self.frozen: Tensor
        self.register_buffer("frozen", frozen.clone(), persistent=False)
        self.dim = dim

    def forward(self, trained: Tensor) -> Tensor:
        """``trained`` and ``frozen``, concatenated."""
        return torch.cat([trained, self.frozen], dim=self.dim)


def lora_layers(module: nn.Module, *, embeddings: bool = False) -> Iterator[tuple[str, Any]]:
    """Every layer with low-rank factors (a PEFT `LoraLayer`), by its name in `module`.

    Args:
        embeddings: those of embeddings, too; their factors are `lora_embedding_A` and `lora_embedding_B`.

    Raises:
        RequestError: a kind of layer that ftcli does not know how to merge.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            is_embedding = embeddings and ADAPTER in layer.lora_embedding_A and ADAPTER not in layer.lora_magnitude_vector
            if not (is_embedding or ADAPTER in layer.lora_A) or getattr(layer, "lora_bias", {}).get(ADAPTER):
                what = f"`{name}` has an adapter on a {type(layer).__name__} layer, or one with a bias"
                raise RequestError("the adapter is not of a kind ftcli merges", [Problem("adapter", what, "linear layers without bias")])
            yield name, layer


def trained_copies(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module that is trained in full beside the adapter (PEFT's `modules_to_save`), by name."""
    from peft.utils import ModulesToSaveWrapper

    return ((name, child) for name, child in module.named_modules() if isinstance(child, ModulesToSaveWrapper))


def base_weight(layer: Any) -> Tensor:
    """(out, in) float32 weight the layer's base computes with."""
    return plain_weight(layer.get_base_layer())


def plain_weight(linear: Any) -> Tensor:
    """(out, in) float32 weight of a linear layer, be it quantised or GPT-2's Conv1D."""
    weight = dequantised_weight(linear) if is_quantised(linear) else _oriented(linear, linear.weight.detach())
    return weight.float()


def set_factors(layer: Any, factors: tuple[Tensor, Tensor], *, keep_initial: bool) -> None:
    """Let A and B start at `factors`.

    Args:
        keep_initial: subtract the initial product for good, so that the start is the identity.
    """
    for linear, factor, dim in zip((layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]), factors, (0, 1), strict=True):
        linear.weight.data.copy_(factor)
        if keep_initial:
            sign = 1.0 if dim == 0 else -1.0
            parametrize.register_parametrization(linear, "weight", Joined(sign * linear.weight.data, dim), unsafe=True)


def freeze_beside(layer: Any, factor_a: Tensor, factor_b: Tensor, scaling: float) -> None:
    """Add a frozen product, ``scaling * factor_b @ factor_a``, to what `layer` computes; it is saved as a part of A and B."""
    own = layer.scaling[ADAPTER]
    for linear, factor, dim in zip(
        (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]), (factor_a, factor_b * (scaling / own)), (0, 1), strict=True
    ):
        frozen = factor.to(linear.weight.device, linear.weight.dtype)
        parametrize.register_parametrization(linear, "weight", Joined(frozen, dim), unsafe=True)


def settle_magnitudes(module: nn.Module) -> None:
    """Set DoRA's magnitudes to the base's row lengths in float32; PEFT rounds them to the base's dtype, and the start is no identity."""
    for _, layer in lora_layers(module):
        if ADAPTER in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[ADAPTER]
            magnitude.weight.data = torch.linalg.vector_norm(base_weight(layer), dim=1)


def settle_trained_copies(module: nn.Module, stored: Mapping[str, Tensor] | None = None) -> None:
    """Tie the copies of an embedding and a head that are tied in the base, and compute them in float32 between casts.

    Args:
        stored: what the copies are going to hold, by the names in the adapter's file; those that differ are not tied.
    """
    first_of: dict[int, tuple[str, Any]] = {}
    for name, wrapper in trained_copies(module):
        original, copy = wrapper.original_module, wrapper.modules_to_save[ADAPTER]
        dtype = next(original.parameters()).dtype
        if dtype != torch.float32:
            copy.float()
            copy.register_forward_pre_hook(lambda _, inputs: tuple(x.float() if x.is_floating_point() else x for x in inputs))
            copy.register_forward_hook(lambda _, inputs, output, dtype=dtype: output.to(dtype))
        if not hasattr(original, "weight"):
            continue  # the head of a classifier, made of several layers
        first_name, first = first_of.setdefault(id(original.weight), (name, copy))
        if first.weight is not copy.weight and (stored is None or torch.equal(stored[f"{first_name}.weight"], stored[f"{name}.weight"])):
            copy.weight = first.weight


def save_adapter(module: nn.Module, folder: Path) -> None:
    """Write the adapter in PEFT's layout, so that PEFT loads it on the original base.

    Raises:
        RequestError: the module carries no adapter.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file

    if not isinstance(module, PeftModel):
        raise TypeError(f"expected a PEFT model, found {type(module).__name__}")
    state = module.state_dict()
    is_joined = False
    for name, layer in lora_layers(module) if is_lora(module) else ():
        for factor in ("lora_A", "lora_B"):
            linear = getattr(layer, factor)[ADAPTER]
            if parametrize.is_parametrized(linear):
                is_joined = True
                state.pop(f"{name}.{factor}.{ADAPTER}.parametrizations.weight.original")
                state[f"{name}.{factor}.{ADAPTER}.weight"] = linear.weight
    with quiet_libraries():
        tensors = get_peft_model_state_dict(module, state_dict=state, save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(own, folder / WEIGHTS_FILE, {"format": "pt"})
    _write_config(module, folder, is_joined)


def _write_config(module: PeftModel, folder: Path, is_joined: bool) -> None:
    """The configuration with the ranks that the factors have, and the same scaling."""
    config = cast("dict[str, Any]", module.peft_config[ADAPTER].to_dict())
    config |= {
        "inference_mode": True,
        "base_model_name_or_path": cast("PreTrainedModel", module.get_base_model()).config._name_or_path,
    }
    if is_joined:
        config |= _joined_ranks(module, config["use_rslora"])
    text = json.dumps({key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.items())}, indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _joined_ranks(module: PeftModel, is_rslora: bool) -> dict[str, Any]:
    """Rank and alpha of every layer as its factors are; the most frequent ones for all, the others by name."""
    found = {}
    for name, layer in lora_layers(module.get_base_model()):
        rank = len(layer.lora_A[ADAPTER].weight)
        # rounded: what was divided and is multiplied again comes out as it was
        found[name] = rank, round(layer.scaling[ADAPTER] * (rank**0.5 if is_rslora else rank), 9)
    (rank, alpha), _ = Counter(found.values()).most_common(1)[0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: own for name, (own, _) in found.items() if own != rank},
        "alpha_pattern": {name: own for name, (_, own) in found.items() if own != alpha},
    }


def is_lora(module: PeftModel) -> bool:
    """Is the adapter LoRA (with its variants), and no other of PEFT's types?"""
    return module.peft_config[ADAPTER].peft_type == "LORA"


def load_adapter(base: PreTrainedModel, folder: Path, peft_type: str | None = None, *, shares_base: bool = False) -> PeftModel:
    """The adapter of `folder` put on `base`, in evaluation mode and frozen, every tensor of the file in its place.

    Args:
        peft_type: what it has to be, in PEFT's capitals; None for any.
        shares_base: other adapters are on the base, too, which must stay as it is.

    Raises:
        RequestError: the folder holds no adapter of that type, or one that does not fit the base.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    config = read_config(folder, peft_type)
    tensors = read_tensors(folder)
    if shares_base and (start := start_of(config.to_dict())) is not None:
        raise unfit(folder, [f"`init_lora_weights: {start}`: its start is taken off the base, which other adapters share"])
    with quiet_libraries():
        try:
            module = cast("PeftModel", get_peft_model(base, config))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise unfit(folder, [str(error).splitlines()[0]]) from error
        tensors = _without_base_copies(folder, module, tensors, shares_base)
        check_tensors(folder, module, tensors)
        settle_trained_copies(module, tensors)
        set_peft_model_state_dict(module, tensors)
    return module.requires_grad_(False).eval()


def read_config(folder: Path, peft_type: str | None = None) -> PeftConfig:
    """The adapter's configuration.

    Raises:
        RequestError: there is none, or one of another type than `peft_type`, or of a start that is lost.
    """
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    try:
        fields = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unfit(folder, [f"cannot read {CONFIG_FILE}: {error}"]) from error
    found = fields.get("peft_type") if isinstance(fields, dict) else None
    if found != (peft_type or found) or found not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise unfit(folder, [f"peft_type is `{found}`, not {f'`{peft_type}`' if peft_type else 'one that PEFT knows'}"])
    if (lost := lost_start(fields)) is not None:
        raise RequestError("the adapter cannot be loaded", [Problem(str(folder), lost, HINT)])
    with quiet_libraries():
        try:
            config = PeftConfig.from_peft_type(**fields)
        except (ValueError, TypeError) as error:
            raise unfit(folder, [f"{CONFIG_FILE}: {str(error).splitlines()[0]}"]) from error
    config.inference_mode = True
    if (folder / ROWS_FILE).is_file():
        config.trainable_token_indices = None  # these rows are put into the base, and so are embedding and head
        in_base = {name.removesuffix(".weight").rpartition(".")[2] for name in whole_in_adapter(folder).values()}
        if in_base:
            config.modules_to_save = [name for name in config.modules_to_save or () if name not in in_base] or None
    return cast("PeftConfig", config)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's weights by the names in its file.

    Raises:
        RequestError: there are none, or the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    has_rows, in_base = (folder / ROWS_FILE).is_file(), set(whole_in_adapter(folder).values())
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
        return {name: tensor for name, tensor in tensors.items() if not ((has_rows and f".{TOKEN_ADAPTER}." in name) or name in in_base)}
    except (OSError, SafetensorError) as error:
        raise unfit(folder, [f"cannot read {WEIGHTS_FILE}: {error}"]) from error


def _without_base_copies(folder: Path, module: PeftModel, tensors: dict[str, Tensor], shares_base: bool) -> dict[str, Tensor]:
    """The tensors without the weights that PEFT stores beside the factors of an embedding or head, which are put under them.

    Raises:
        RequestError: they are not the base's own, and others share it.
    """
    state, kept = module.state_dict(), {}
    for name, tensor in tensors.items():
        under = state.get(name) if name.endswith(".base_layer.weight") else None
        if under is None or under.shape != tensor.shape or not under.is_floating_point():
            kept[name] = tensor
            continue
        if shares_base and not torch.equal(under, tensor.to(under.device, under.dtype)):
            raise unfit(folder, [f"`{name}` is not what this base has there, and the base is shared with other adapters"])
        under.copy_(tensor)
    return kept


def check_tensors(folder: Path, module: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Refuse weights that are not exactly those of `module`'s adapter.

    Raises:
        RequestError: a tensor is missing, has no place, or is of another shape.
    """
    from peft import get_peft_model_state_dict

    require_fit(folder, get_peft_model_state_dict(module, save_embedding_layers=False), tensors)


def require_fit(folder: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Refuse tensors of an adapter's file that are not exactly those that the model has places for.

    Raises:
        RequestError: a tensor is missing, has no place, or is of another shape.
    """
    kinds = {
        "not in the file": expected.keys() - found.keys(),
        "without a place in the model": found.keys() - expected.keys(),
        "of another shape": {name for name in found.keys() & expected.keys() if found[name].shape != expected[name].shape},
    }
    problems = []
    for kind, names in kinds.items():
        more = f", ... and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        if names:
            problems.append(f"{len(names)} tensors {kind}: {', '.join(sorted(names)[:_LISTED])}{more}")
    if problems:
        raise unfit(folder, problems)


def unfit(folder: Path, problems: list[str]) -> RequestError:
    """What is wrong with an adapter's files, as an error that is to be raised."""
    return RequestError("the adapter cannot be loaded", [Problem(str(folder), problem) for problem in problems])


def merge_adapter(module: nn.Module, target: MergeTarget = "dequantised", original: PreTrainedModel | None = None) -> PreTrainedModel:
    """The base model with the adapter folded into plain weights, computed in float32 and rounded once; `module` is used up.

    W + s * B @ A, for DoRA with every row scaled to its learnt length; other types than LoRA fold by their own formula.

    Args:
        target: what a quantised base becomes: the weights it computed with (the only target that equals the adapter), the weights
            it was made from, or the merged weights as they are after another quantisation.
        original: the base before quantisation, for target `original`.
    """
    from peft import PeftModel

    if not isinstance(module, PeftModel):
        raise TypeError(f"expected a PEFT model, found {type(module).__name__}")
    model = cast("PreTrainedModel", module.get_base_model())
    if not is_lora(module):
        from ftcli.methods.peft_merge import merge_layers

        merge_layers(model)
        return _as_plain(model)

    def target_weight(name: str, base: nn.Module) -> Tensor:
        return plain_weight(base if original is None else original.get_submodule(name))

    with torch.no_grad():
        for name, layer in list(lora_layers(model, embeddings=True)):
            base = layer.get_base_layer()
            merged = _merged_weight(layer, target_weight(name, base))
            if target == "requantised" and is_quantised(base):
                merged = requantised_weight(base, merged)
            model.set_submodule(name, _plain_layer(base, merged, model.dtype))
        for name, layer in list(model.named_modules()):
            if is_quantised(layer):
                model.set_submodule(name, _plain_layer(layer, target_weight(name, layer), model.dtype))
    return _as_plain(model)


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with what it computes with in place of weights in 4 or 8 bits; it is used up."""
    with torch.no_grad():
        for name, layer in list(model.named_modules()):
            if is_quantised(layer):
                model.set_submodule(name, _plain_layer(layer, plain_weight(layer), model.dtype))
    return _as_plain(model)


def _as_plain(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, its adapters merged, with the copies that were trained in place of their originals and no trace of the wrapping.

    A head that was tied to the embedding stays so only where both are still one: copies of one of them are parameters of their own.
    """
    made: dict[int, nn.Parameter] = {}
    for name, wrapper in list(trained_copies(model)):
        module, copies = wrapper.original_module, dict(wrapper.modules_to_save[ADAPTER].named_parameters())
        for own, original in list(module.named_parameters()):
            place, _, last = own.rpartition(".")
            trained = made.setdefault(id(copies[own]), nn.Parameter(copies[own].data.to(original.dtype)))
            setattr(module.get_submodule(place), last, trained)
        model.set_submodule(name, module)
    settle_tying(model)
    _forget_wrapping(model)
    model.requires_grad_(True).eval()
    return model


def _merged_weight(layer: Any, weight: Tensor) -> Tensor:
    """(out, in) float32; of an embedding (tokens, out)."""
    if ADAPTER in layer.lora_embedding_A:
        product = layer.lora_embedding_B[ADAPTER].float() @ layer.lora_embedding_A[ADAPTER].float()
        changed: Tensor = weight + product.T * layer.scaling[ADAPTER]
        return changed
    delta: Tensor = layer.lora_B[ADAPTER].weight.float() @ layer.lora_A[ADAPTER].weight.float()
    merged: Tensor = weight + delta * layer.scaling[ADAPTER]
    if ADAPTER in layer.lora_magnitude_vector:
        lengths = torch.linalg.vector_norm(merged, dim=1)
        merged = merged * (layer.lora_magnitude_vector[ADAPTER].weight.float() / lengths)[:, None]
    return merged


def _plain_layer(base: nn.Module, weight: Tensor, dtype: torch.dtype) -> nn.Module:
    """`base` with the (out, in) `weight`; a quantised layer becomes the plain class it was made from."""
    if not is_quantised(base):
        base.weight = nn.Parameter(_oriented(base, weight).to(dtype).contiguous())
        return base
    from transformers.pytorch_utils import Conv1D

    num_out, num_in = weight.shape
    is_conv = issubclass(getattr(base, "source_cls", nn.Linear), Conv1D)
    with torch.device("meta"):
        plain = Conv1D(num_out, num_in) if is_conv else nn.Linear(num_in, num_out, bias=base.bias is not None)
    plain.weight = nn.Parameter(_oriented(plain, weight).to(dtype).contiguous())
    if isinstance(base.bias, Tensor):
        plain.bias = nn.Parameter(base.bias.data.to(dtype))
    return plain


def _oriented(layer: nn.Module, weight: Tensor) -> Tensor:
    """(out, in) to the layer's own orientation and back: GPT-2's Conv1D stores (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return weight.T if isinstance(layer, Conv1D) else weight


def _forget_wrapping(model: PreTrainedModel) -> None:
    """Remove what PEFT and the quantiser left on the model and its configuration."""
    if "hf_quantizer" in model.__dict__:  # how a quantised folder was read is no way to write a plain one
        model.__dict__.pop("_weight_conversions", None)
    for name in ("peft_config", "hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        if name in model.__dict__:
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
