"""Bottleneck adapters in files: PEFT's layout, one plain bottleneck a sub-block whatever was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from ftcli.methods.adapter import CONFIG_FILE, WEIGHTS_FILE, require_fit, unfit
from ftcli.methods.bottleneck.layer import ADAPTERS, Bottleneck, bottleneck_layers
from ftcli.methods.bottleneck.tuner import BOTTLENECK, BottleneckConfig
from ftcli.models.quiet import quiet_libraries

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER = "default"


def adapter_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors by the names PEFT gives them in files; experts are averaged."""
    found: dict[str, Tensor] = {}
    for name, layer in bottleneck_layers(module):
        if ADAPTER in layer.bottleneck_adapters:
            plain = cast("Bottleneck", layer.bottleneck_adapters[ADAPTER]).plain_state()
            found |= {f"{name}.{ADAPTERS}.{key}": tensor for key, tensor in plain.items()}
    return found


def save_adapter(module: nn.Module, folder: Path) -> None:
    """Write the adapter so that PEFT loads it on the original base once `ftcli.methods.bottleneck.tuner` is imported."""
    model = cast("PeftModel", module)
    config = cast("dict[str, Any]", model.peft_config[ADAPTER].to_dict())
    config["base_model_name_or_path"] = cast("PreTrainedModel", model.get_base_model()).config._name_or_path
    write_adapter(folder, config, adapter_tensors(module))


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write configuration and weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(own, folder / WEIGHTS_FILE, {"format": "pt"})
    text = json.dumps(dict(sorted({**config, "inference_mode": True}.items())), indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter of `folder` put on `base`, in evaluation mode and frozen, every tensor of the file in its place.

    Raises:
        RequestError: the folder holds no bottleneck adapter, or one that does not fit the base.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    fields, tensors = read_adapter(folder)
    with quiet_libraries():
        config: Any = BottleneckConfig.from_peft_type(**fields)  # type: ignore[no-untyped-call]
        module = cast("PeftModel", get_peft_model(base, config))
        require_fit(folder, adapter_tensors(module), tensors)
        set_peft_model_state_dict(module, tensors)
    return module.requires_grad_(False).eval()


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration's fields and the tensors of a saved bottleneck adapter.

    Raises:
        RequestError: there is none in the folder.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        fields = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        kind = fields.get("peft_type") if isinstance(fields, dict) else None
    except (OSError, ValueError) as error:
        raise unfit(folder, [f"cannot read {CONFIG_FILE}: {error}"]) from error
    if kind != BOTTLENECK.value:
        raise unfit(folder, [f"peft_type is `{kind}`, not `{BOTTLENECK.value}`"])
    try:
        return fields, load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise unfit(folder, [f"cannot read {WEIGHTS_FILE}: {error}"]) from error
