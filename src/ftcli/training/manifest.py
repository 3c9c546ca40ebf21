"""What a run is made of, as hashes and versions."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.files import file_hashes, sha256_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ftcli.models.settings import Model
    from ftcli.models.tokenizer import Tokenizer
    from ftcli.training.assemble import DataParts

KEPT = ("recipe.yaml", "recipe.resolved.yaml", "metrics.jsonl", "samples.jsonl", "scores.jsonl", "probe.json")
"""Files of a run, beside its artefact, that are never written again."""
PACKAGES = ("ftcli", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors", "datasets", "numpy")


def versions() -> dict[str, str | None]:
    """Version of each package that can change a result; None where it is not installed."""
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, device and processes."""
    import torch

    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "num_processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
    }


def fingerprints(data: DataParts) -> dict[str, str]:
    """Hashes of tokenizer (with template) and of each source's trees; a resumed run must find the same."""
    keys = {f"data/{store.name}": store.report.cache_key for store in (*data.prepared.train, *data.prepared.evaluation)}
    return {"tokenizer": data.tokenizer.fingerprint, **keys}


def run_files(folder: Path, artefact: str) -> dict[str, str]:
    """SHA-256 of everything that a finished run does not write again, by path in its folder."""
    found = {name: sha256_of(folder / name) for name in KEPT if (folder / name).is_file()}
    return found | {f"{artefact}/{name}": digest for name, digest in file_hashes(folder / artefact).items()}


def template_note(model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    """Which chat template the run uses, and whether the base has one of its own."""
    from ftcli.models.tokenizer import load_tokenizer

    own = tokenizer.chat_template
    if model.template is not None:
        reference = model.tokenizer or model.base
        own = None if reference is None else load_tokenizer(reference, revision=model.revision).chat_template
    return {"asked": model.template, "base_has_one": own is not None, "is_the_bases": own is not None and own == tokenizer.chat_template}


def memory_in_use() -> int | None:
    """Bytes this process has taken of an accelerator at most so far, or where there is none holds in memory; None where nobody says."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None


def peak_memory_bytes() -> dict[str, int]:
    """The most memory this process has held, and what it has taken of an accelerator."""
    import torch

    scale = 1 if sys.platform == "darwin" else 1024
    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.max_memory_allocated()
    return found
