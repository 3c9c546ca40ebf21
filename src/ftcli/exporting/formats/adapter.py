"""An adapter in PEFT's layout, as plain PEFT, vLLM and other servers load it on the original base."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftcli.errors import Problem, RequestError
from ftcli.exporting.checks import Check
from ftcli.exporting.difference import compare, logits_on
from ftcli.exporting.export_card import base_name
from ftcli.exporting.formats.format import Format, Subject
from ftcli.files import write_exact_json
from ftcli.models.added_rows import ROWS_FILE, whole_in_adapter
from ftcli.models.fingerprint import BASE_FILE, noted_rope
from ftcli.models.locate import is_on_hub, model_folder

if TYPE_CHECKING:
    from torch import nn

    from ftcli.exporting.source import Source
    from ftcli.models.quantisation import Quantization

MAX_KL = 1e-6  # nats per token, between ftcli's adapter and plain PEFT's on the same base
MAX_KL_QUANTISED = 1e-2  # on a quantised base, whose products other dtypes may compute
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


class Adapter(Format):
    """The adapter alone, a few megabytes."""

    kind: ClassVar[str] = "adapter"
    dtypes: ClassVar[tuple[str, ...]] = ()
    is_merged: ClassVar[bool] = False

    def check(self, source: Source) -> None:
        if problems := _foreign_to_peft(source):
            raise RequestError("PEFT alone cannot load the adapter", [Problem(source.name, what, hint) for what, hint in problems])

    def check_portable(self, source: Source) -> None:
        if source.base is None or not is_on_hub(source.base):
            problem = Problem(source.name, f"its base `{base_name(source.base)}` is not on the hub", "--to hf holds base and adapter")
            raise RequestError("the adapter is of no use on another machine", [problem])

    def num_bytes(self, num_parameters: int, source: Source) -> int:
        return sum(path.stat().st_size for path in adapter_folder(source).iterdir() if path.is_file()) + 2**20

    def write(self, subject: Subject, folder: Path) -> None:
        source = subject.source
        assert source.base is not None
        copy_adapter(source, folder, source.base if is_on_hub(source.base) else str(model_folder(source.base).resolve()))
        source.tokenizer.save(folder)

    def verify(self, subject: Subject, folder: Path) -> Sequence[Check]:
        """What the card says, by PEFT alone: the base is the one that adapter_config.json names."""
        source, name = subject.source, "the files, loaded by PEFT"
        try:
            loaded = _loaded_by_peft(source, folder)
        except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
            return [Check(name, False, next(iter(str(error).splitlines()), type(error).__name__))]
        found = compare(subject.expected, logits_on(loaded, source.probe))
        if source.quantization is not None:
            detail = f"on the base in {source.quantization.format}; bitsandbytes' own products may round more"
            return [Check(name, found.kl < MAX_KL_QUANTISED, detail, found)]
        return [Check(name, found.kl < MAX_KL and found.argmax_agreement == 1.0, "", found)]

    def stored_dtype(self, source: Source) -> str:
        return "as trained"

    def usage(self, name: str, source: Source) -> str:
        imports, how = "AutoTokenizer", ""
        if source.quantization is not None:
            given = ", ".join(f"{key}={value!r}" for key, value in _stored_as(source.quantization).items())
            imports, how = "AutoTokenizer, BitsAndBytesConfig", f", quantization_config=BitsAndBytesConfig({given})"
        return (
            f"```python\nfrom peft import AutoPeftModelForCausalLM\nfrom transformers import {imports}\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("."{how})  # loads the base that adapter_config.json names\n'
            'tokenizer = AutoTokenizer.from_pretrained(".")\n```'
        )

    def next_commands(self, output: Path) -> Sequence[str]:
        folder = shlex.quote(str(output))
        return [f"ftcli generate {folder} 'Once upon a time'", f"ftcli serve {folder}"]


def adapter_folder(source: Source) -> Path:
    """Where the adapter is, in PEFT's layout.

    Raises:
        RequestError: the source has none.
    """
    folder = source.adapter
    if folder is None or not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        what = f"{source.description} holds no adapter in PEFT's layout"
        raise RequestError("there is no adapter to export", [Problem("", what, "--to hf writes the whole model")])
    return folder


def adapter_config(source: Source) -> dict[str, Any]:
    """The adapter's configuration.

    Raises:
        RequestError: there is no adapter.
    """
    config: dict[str, Any] = json.loads((adapter_folder(source) / CONFIG_FILE).read_text(encoding="utf-8"))
    return config


def copy_adapter(source: Source, folder: Path, base: str) -> None:
    """Write the adapter's weights and its configuration, which names `base`, into `folder`."""
    origin = adapter_folder(source)
    for name in (WEIGHTS_FILE, ROWS_FILE):
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    revision = source.recipe.model.revision if source.recipe is not None else None
    config = {"revision": revision, **_given(adapter_config(source)), "inference_mode": True, "base_model_name_or_path": base}
    write_exact_json(folder / CONFIG_FILE, {"task_type": "CAUSAL_LM", **config})
    note = json.loads((origin / BASE_FILE).read_text(encoding="utf-8")) if (origin / BASE_FILE).is_file() else {}
    if source.quantization is not None:
        note["quantize"] = source.quantization.model_dump()
    if note:
        write_exact_json(folder / BASE_FILE, note | {"base": base_name(source.base)})


def _given(config: dict[str, Any]) -> dict[str, Any]:
    """Without what PEFT asks for and the configuration leaves open."""
    return {key: value for key, value in config.items() if value is not None or key not in ("task_type", "revision")}


def _foreign_to_peft(source: Source) -> list[tuple[str, str]]:
    """(what of the adapter PEFT alone does not load, what does), from its configuration."""
    from ftcli.methods.bottleneck.tuner import BOTTLENECK

    folder, config = adapter_folder(source), adapter_config(source)
    kind, task = config.get("peft_type"), config.get("task_type")
    found = []
    if kind == BOTTLENECK.value:
        found.append((f"it is of kind `{kind}`, which is ftcli's own", f"`ftcli serve {folder}` and `ftcli generate` load it as it is"))
    if task not in (None, "CAUSAL_LM") or (source.recipe is not None and source.recipe.objective.head is not None):
        found.append(("it is a classifier with a head of its own", "`ftcli predict` loads the run, `ftcli merge` writes a model of it"))
    if source.base is None:
        found.append(("its base was made from random weights, and is nowhere", "--to hf holds base and adapter"))
    if noted_rope(folder) is not None:
        found.append(("it was trained with scaled positions, and PEFT would put it on the base as it is", "--to hf holds base and adapter"))
    if (folder / ROWS_FILE).is_file() and not config.get("trainable_token_indices") and not whole_in_adapter(folder):
        found.append(("the rows of its new tokens are kept beside it, where PEFT does not look", "--to hf holds base and adapter"))
    return found


def _stored_as(quantization: Quantization) -> dict[str, Any]:
    """The base as it was under the adapter, in the words of transformers' `BitsAndBytesConfig`."""
    if quantization.format == "int8":
        return {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quantization.format,
        "bnb_4bit_use_double_quant": quantization.double_quant,
    }


def _loaded_by_peft(source: Source, folder: Path) -> nn.Module:
    """What the card's lines load, in float32, with the exact products of quantised weights."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import BitsAndBytesConfig

    from ftcli.layout.model import inner_model
    from ftcli.models.quantisation import settle

    if source.quantization is None:
        loaded: nn.Module = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return loaded.to(source.device)
    stored = BitsAndBytesConfig(**_stored_as(source.quantization))
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=stored)
    settle(inner_model(loaded), source.quantization, source.device)
    return loaded
