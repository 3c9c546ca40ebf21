"""What a run is made of, as hashes and versions."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ftcli.training.assemble import DataParts

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
