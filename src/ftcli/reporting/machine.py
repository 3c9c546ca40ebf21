"""What this machine and this installation offer: versions, devices, memory, disk, extras, and what to be warned of."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.units import GIB, format_bytes

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# What a user gets with an extra of pyproject.toml; an extra that is not listed shows its packages only.
EXTRAS = {
    "tensorboard": "metrics in TensorBoard, `trackers: [tensorboard]`",
    "wandb": "metrics in Weights & Biases, `trackers: [wandb]`",
    "mlflow": "metrics in MLflow, `trackers: [mlflow]`",
    "zst": "data files that end in .zst",
    "gptq": "weights in 4 bits that vLLM runs, `ftcli export --to gptq`",
    "llama-cpp": "k-quants, and exports to GGUF run by llama.cpp before they get their name",
    "dev": "tests, lint and types of ftcli itself",
}
LOW_DISK_BYTES = 2 * GIB
LOW_MEMORY_BYTES = 2 * GIB


def look_at_machine(cache_folder: Path) -> dict[str, Any]:
    """Everything `ftcli doctor` reports, ready for JSON.

    Args:
        cache_folder: where tokenised data goes; it need not exist.
    """
    required, extras = _requirements()
    packages = {requirement.name: _installed(requirement) for requirement in required}
    memory = _memory()
    report: dict[str, Any] = {
        "ftcli": version_of("ftcli"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found["version"] for name, found in packages.items()},
        "cpu": {"cores": num_cores(), "flags": _bf16_flags(), **memory},
        "accelerators": [],
        "disk": {str(place): _free(place) for place in (Path.cwd(), cache_folder)},
        "extras": {name: _extra(name, requirements) for name, requirements in extras.items()},
        "warnings": [found["warning"] for found in packages.values() if found["warning"]],
    }
    report["warnings"] += _look_at_torch(report)
    report["warnings"] += [
        f"{format_bytes(free)} free in {place}: a checkpoint may not fit" for place, free in report["disk"].items() if free < LOW_DISK_BYTES
    ]
    if memory["available"] is not None and memory["available"] < LOW_MEMORY_BYTES:
        report["warnings"].append(f"{format_bytes(memory['available'])} of memory available: loading a model may fail")
    return report


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def num_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    return max(1, min(cores, round(int(quota) / int(period)))) if quota.isdecimal() and period.strip().isdecimal() else cores


def _requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """What ftcli needs, and what each extra needs; empty where ftcli runs from its source without being installed."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("ftcli") or []
        extras: dict[str, list[Requirement]] = {name: [] for name in metadata.metadata("ftcli").get_all("Provides-Extra") or []}
    except metadata.PackageNotFoundError:
        return [Requirement(name) for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")], {}
    required = []
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            required.append(requirement)
        for name, members in extras.items():
            if requirement.marker is not None and "extra" in str(requirement.marker) and requirement.marker.evaluate({"extra": name}):
                members.append(requirement)
    return required, extras


def _installed(requirement: Requirement) -> dict[str, str | None]:
    found = version_of(requirement.name)
    if found is None:
        return {"version": None, "warning": f"{requirement.name} is not installed"}
    fits = requirement.specifier.contains(found, prereleases=True)
    return {"version": found, "warning": None if fits else f"{requirement.name} {found} is installed, ftcli needs {requirement.specifier}"}


def _extra(name: str, requirements: list[Requirement]) -> dict[str, Any]:
    packages = {requirement.name: version_of(requirement.name) for requirement in requirements}
    return {"adds": EXTRAS.get(name), "packages": packages, "installed": all(packages.values())}


def _look_at_torch(report: dict[str, Any]) -> list[str]:
    """Fills in what only torch knows; the warnings that follow from it."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [f"torch cannot be imported: {error}"]
    cpu = report["cpu"]
    cpu["threads"] = torch.get_num_threads()
    cpu["capability"] = torch.backends.cpu.get_cpu_capability()
    warnings = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            bf16 = properties.major >= 8  # emulated, and slow, before compute capability 8.0
            report["accelerators"].append({"kind": "cuda", "name": properties.name, "memory": properties.total_memory, "bf16": bf16})
    elif torch.backends.mps.is_available():
        report["accelerators"].append({"kind": "mps", "name": platform.processor(), "memory": cpu["memory"], "bf16": True})
    elif Path("/proc/driver/nvidia/version").exists():
        warnings.append(f"an NVIDIA driver is here, but torch {torch.__version__} sees no GPU: a CPU build, or no device is visible")
    if not report["accelerators"] and sys.platform == "linux" and not cpu["flags"]:
        warnings.append("the CPU has no bf16 arithmetic (avx512_bf16, amx_bf16): `mixed_precision: auto` trains in float32")
    if cpu["threads"] > cpu["cores"]:
        warnings.append(f"torch uses {cpu['threads']} threads on {cpu['cores']} cores: set OMP_NUM_THREADS={cpu['cores']}")
    return warnings


def _bf16_flags() -> list[str]:
    """Which of the instruction sets that make bfloat16 fast this CPU has."""
    flags = next((line for line in _read(Path("/proc/cpuinfo")).splitlines() if line.startswith(("flags", "Features"))), "").split()
    return [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if flag in flags]


def _memory() -> dict[str, int | None]:
    """Bytes of memory this process may use, the container's limit included, and what is available of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines() if ":" in line)
    available = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None
    limit, used = _read(Path("/sys/fs/cgroup/memory.max")).strip(), _read(Path("/sys/fs/cgroup/memory.current")).strip()
    if limit.isdecimal() and int(limit) < total:
        total = int(limit)
        available = min(total - int(used or 0), available if available is not None else total)
    return {"memory": total, "available": available}


def _free(place: Path) -> int:
    """Bytes free where `place` is or would be made."""
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    return shutil.disk_usage(existing).free


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
