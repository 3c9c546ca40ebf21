"""An adapter folder in PEFT's layout, written whole or not at all, without torch: weights, configuration, manifest, model card."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ftcli.errors import GateError, Problem
from ftcli.files import new_folder, said_when_disk_is_full, sha256_of, write_json, write_text
from ftcli.merging.lora.adapter import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from ftcli.merging.lora.factor import Factored
from ftcli.merging.numbers import DTYPES, ITEM_BYTES, Array, fits, from_float32
from ftcli.models.locate import is_on_hub

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
_ALIGNMENT = 8  # of the first tensor's bytes in the file


@dataclass(frozen=True)
class AdapterParts:
    """What goes into an adapter's folder."""

    base: str | None
    factors: list[tuple[str, bool, Factored]]
    """Module, whether it is an embedding, and what is added to it."""
    full: Mapping[str, Array] = field(default_factory=dict)
    """Whole tensors by the base's names."""
    saved_modules: list[str] = field(default_factory=list)
    """Ends of the names of the modules that `full` holds."""
    fan_in_fan_out: bool = False
    target_modules: list[str] | str | None = None
    """None names every module in full."""
    dtype: str = "float32"
    like: Mapping[str, Any] = field(default_factory=dict)
    """A configuration whose `task_type`, `revision` and `peft_version` hold here, too."""
    extra_files: Path | None = None
    """A folder whose tokenizer files come along."""

    def tensors(self) -> dict[str, Array]:
        """Every tensor by its name in the file."""
        found: dict[str, Array] = {}
        for module, is_embedding, result in self.factors:
            first, second = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
            found[f"{PREFIX}{module}.{first}"], found[f"{PREFIX}{module}.{second}"] = result.a, result.b
        return found | {PREFIX + name: array for name, array in self.full.items()}

    def config(self) -> dict[str, Any]:
        """PEFT's configuration: alpha = r everywhere, so that the scaling is 1."""
        ranks = {module: result.rank for module, _, result in self.factors}
        rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
        others = {module: other for module, other in ranks.items() if other != rank}
        return {
            "peft_type": "LORA",
            "task_type": self.like.get("task_type", "CAUSAL_LM"),
            "base_model_name_or_path": self.base,
            "revision": self.like.get("revision"),
            "peft_version": self.like.get("peft_version"),
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "target_modules": self.target_modules if self.target_modules is not None and ranks else sorted(ranks),
            "rank_pattern": others,
            "alpha_pattern": others,
            "use_rslora": False,
            "use_dora": False,
            "bias": "none",
            "fan_in_fan_out": self.fan_in_fan_out,
            "modules_to_save": self.saved_modules or None,
            "init_lora_weights": True,
        }


def write_adapter(
    parts: AdapterParts, output: Path, inputs: Mapping[str, Path], verify: Callable[[Path, int], dict[str, Any]], kind: str = "merge"
) -> None:
    """Write the folder; it gets its name once `verify`, called with the folder and its weights' bytes, has not raised.

    Args:
        inputs: what it was made from; their hashes go into the manifest.
        verify: what to note in the manifest.

    Raises:
        GateError: a number does not fit `dtype`.
    """
    with new_folder(output) as partial:
        write_tensors(parts.tensors(), partial / WEIGHTS_FILE, parts.dtype)
        write_json(partial / CONFIG_FILE, parts.config())
        for name in TOKENIZER_FILES if parts.extra_files is not None else ():
            source = parts.extra_files / name if parts.extra_files is not None else output
            if source.is_file():
                shutil.copyfile(source, partial / name)
        noted = verify(partial, (partial / WEIGHTS_FILE).stat().st_size)
        hashes = {name: sha256_of(path) for name, path in inputs.items()}
        write_json(partial / "manifest.json", {"kind": kind, "inputs": hashes, **noted})
        write_text(partial / "README.md", _card(parts, output.name, noted, list(inputs)))


def write_tensors(tensors: Mapping[str, Array], path: Path, dtype: str) -> None:
    """Write a safetensors file.

    Raises:
        GateError: a number is not finite, or not in `dtype`.
    """
    bad = [name for name, array in tensors.items() if not fits(array, DTYPES[dtype])]
    if bad:
        raise GateError(f"{len(bad)} tensors hold numbers that {dtype} has not", [Problem(name, "is not finite") for name in bad[:5]])
    code, position = DTYPES[dtype], 0
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, array in sorted(tensors.items()):
        end = position + array.size * ITEM_BYTES[code]
        entries[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    with said_when_disk_is_full(path), path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, array in sorted(tensors.items()):
            file.write(from_float32(np.ascontiguousarray(array), code).tobytes())


def _card(parts: AdapterParts, name: str, noted: Mapping[str, Any], inputs: list[str]) -> str:
    """README.md; it names no folder of this machine."""
    base = parts.base or ""
    is_hub_id = bool(base) and is_on_hub(base)
    front = ["---", *([f"base_model: {base}"] if is_hub_id else []), "library_name: peft", "tags:", "- ftcli", "- lora", "- merge", "---"]
    shown = base if is_hub_id or base.startswith("builtin:") else Path(base).name
    sources = sorted({Path(item).parent.name or Path(item).stem for item in inputs})
    plain = {key: value for key, value in noted.items() if not isinstance(value, dict)}
    return "\n".join(
        [
            *front,
            "",
            f"# {name}",
            "",
            f"A LoRA adapter for `{shown}`, made by ftcli from {', '.join(f'`{source}`' for source in sources)}.",
            "",
            "```json",
            json.dumps(plain, indent=2),
            "```",
            "",
        ]
    )
