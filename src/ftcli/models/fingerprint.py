"""Which base an adapter belongs to, told from the weights and not from a name that may have moved."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.files import write_json
from ftcli.models.quantisation import is_quantised

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE_FILE = "base.json"
_SAMPLED_NUMBERS = 1024


def base_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and the first numbers of the decoder's weights, with how they are stored before it.

    The head is left out: a classifier's begins with random numbers. Numbers are rounded to bfloat16 first, so
    that a model is the same whether it was loaded as float32 or as bfloat16.
    """
    import torch

    stored = next((type(module.weight).__name__ for module in model.modules() if is_quantised(module)), "plain")
    digest = hashlib.sha256()
    for name, parameter in sorted(model.base_model.named_parameters(), key=lambda item: item[0]):
        numbers = parameter.detach().reshape(-1)[:_SAMPLED_NUMBERS]
        numbers = numbers.to(torch.bfloat16).view(torch.uint8) if numbers.is_floating_point() else numbers.view(torch.uint8)
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + numbers.cpu().contiguous().numpy().tobytes())
    return f"{stored}:{digest.hexdigest()}"


def stored_fingerprint(folder: Path) -> str:
    """SHA-256 over the safetensors files of a model folder: all they say of their tensors, and the first numbers of each.

    Reads some kilobytes a tensor, and needs no model. Two ways of storing the same model have two fingerprints.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            start = file.tell()
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + header)
            for name, tensor in json.loads(header).items():
                if name != "__metadata__":
                    first, end = tensor["data_offsets"]
                    file.seek(start + first)
                    digest.update(file.read(min(end - first, 4 * _SAMPLED_NUMBERS)))
    return digest.hexdigest()


def is_other_base(found: str, recorded: str) -> bool:
    """Are these the fingerprints of two models? Those of different storage cannot be compared, and count as one."""
    return found.partition(":")[0] == recorded.partition(":")[0] and found != recorded


def note_base(folder: Path, name: str | None, fingerprint: str, rope: dict[str, Any] | None = None) -> None:
    """Leave beside an adapter what it was trained on.

    Args:
        rope: the recipe's scaling of positions, which the base has to have again.
    """
    write_json(folder / BASE_FILE, {"base": name, "fingerprint": fingerprint, **({} if rope is None else {"rope": rope})})


def noted_rope(folder: Path) -> dict[str, Any] | None:
    """The scaling of positions that an adapter folder was trained with; None for none."""
    try:
        found: Any = json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("rope") if isinstance(found, dict) else None


def noted_base(folder: Path) -> tuple[str | None, str | None]:
    """(name, fingerprint) of the base that an adapter folder was trained on, as far as it says so."""
    try:
        note: Any = json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))
        return note["base"], note["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return config.get("base_model_name_or_path"), None
    except (OSError, ValueError, AttributeError):
        return None, None
