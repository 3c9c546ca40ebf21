"""Which base an adapter belongs to, and what a model's answers depend on: told from the model and not from a name that may have moved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.files import write_json
from ftcli.models.quantisation import is_quantised

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

BASE_FILE = "base.json"
_SAMPLED_NUMBERS = 1024
# Beyond this many bytes only both ends of every tensor are read: of a large model some seconds, and rows added at the end are seen.
_MAX_WHOLE_BYTES = 2 * 2**30
# Say where a model came from, and nothing about what it computes.
_ORIGINS = ("_name_or_path", "transformers_version", "_commit_hash")


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


def answers_fingerprint(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]], *about: object) -> str:
    """SHA-256 over all that the answers of a model at work depend on: what kept answers are found by.

    That is its numbers; its configuration, which has the scaling of positions and the way weights are quantised; the code that
    computes it; and the libraries' versions.

    Args:
        model: under whatever a method has put on it.
        tensors: the parameters and buffers that are used, those of the method among them.
        about: what else the answers depend on, with a `repr` that says it: a method's settings, the precision of the arithmetic.
    """
    import torch
    import transformers

    named = sorted(tensors, key=lambda item: item[0])
    is_large = sum(tensor.numel() * tensor.element_size() for _, tensor in named) > _MAX_WHOLE_BYTES
    digest = hashlib.sha256()
    settings = _without_origins(model.config.to_dict()) | {"attention": model.config._attn_implementation}
    code = [type(model).__module__, type(model).__qualname__, torch.__version__, transformers.__version__]
    digest.update(json.dumps([code, settings], sort_keys=True, default=str).encode() + repr(about).encode())
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        flat = tensor.detach().reshape(-1)
        for part in (flat[:_SAMPLED_NUMBERS], flat[-_SAMPLED_NUMBERS:]) if is_large else (flat,):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stored_fingerprint(folder: Path) -> str:
    """SHA-256 over a model folder: its configuration and code, all that its safetensors files say of their tensors, and both ends of
    each.

    Reads some kilobytes a tensor, and needs no model. Two ways of storing the same model have two fingerprints.
    """
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*config.json"), *folder.glob("*.py")]):
        digest.update(f"{path.name} ".encode() + _stored_settings(path))
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            start = file.tell()
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + header)
            tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
            for first, end in chain.from_iterable(_ends(*tensor["data_offsets"]) for tensor in tensors):
                file.seek(start + first)
                digest.update(file.read(end - first))
    return digest.hexdigest()


def _ends(first: int, end: int) -> Iterator[tuple[int, int]]:
    """The bytes that are read of those of a tensor."""
    size = min(end - first, 4 * _SAMPLED_NUMBERS)
    yield first, first + size
    yield end - size, end


def _stored_settings(path: Path) -> bytes:
    """A file's content; of JSON what it says, however it is written."""
    content = path.read_bytes()
    if path.suffix != ".json":
        return content
    try:
        return json.dumps(_without_origins(json.loads(content)), sort_keys=True).encode()
    except ValueError:
        return content


def _without_origins(settings: Any) -> Any:
    """Settings but for names and versions, of a model's parts, too."""
    if not isinstance(settings, dict):
        return settings
    return {str(key): _without_origins(value) for key, value in settings.items() if key not in _ORIGINS}


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
    return _noted(folder, "rope")


def noted_storage(folder: Path) -> dict[str, Any] | None:
    """How the base is stored under the adapter of a folder; None for as it is."""
    return _noted(folder, "quantize")


def _noted(folder: Path, name: str) -> dict[str, Any] | None:
    try:
        found: Any = json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get(name) if isinstance(found, dict) else None


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
