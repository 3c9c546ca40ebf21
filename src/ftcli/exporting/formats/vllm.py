"""One base with many adapters, laid out for vLLM, with the line that serves them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftcli.errors import Problem, RequestError
from ftcli.exporting.checks import Check
from ftcli.exporting.difference import compare, logits_on
from ftcli.exporting.export_card import is_hub_id
from ftcli.exporting.formats.adapter import CONFIG_FILE, MAX_KL, adapter_folder, copy_adapter
from ftcli.exporting.formats.format import Format, Subject
from ftcli.exporting.formats.hf import BYTES_PER_WEIGHT
from ftcli.models.added_rows import needs_another_base
from ftcli.models.load import save_model

if TYPE_CHECKING:
    from ftcli.exporting.source import Source

SCRIPT, BASE, ADAPTERS = "serve.sh", "base", "adapters"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be."""


class Vllm(Format):
    """Adapters by name beside their base, and `serve.sh`."""

    kind: ClassVar[str] = "vllm"
    dtypes: ClassVar[tuple[str, ...]] = ()
    is_merged: ClassVar[bool] = False
    single: ClassVar[bool] = False

    def check(self, source: Source) -> None:
        adapter_folder(source)
        problems = _unservable(source)
        if problems:
            raise RequestError("vLLM cannot serve the adapter", [Problem(source.name, what, "--to hf merges it") for what in problems])

    def check_together(self, sources: Sequence[Source]) -> None:
        bases = sorted({str(source.base) for source in sources})
        if len(bases) > 1:
            what = f"the adapters are on {len(bases)} bases: {', '.join(bases)}"
            raise RequestError("the adapters cannot be served together", [Problem("", what, "export them base by base")])
        names = [source.name for source in sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RequestError("the adapters cannot be served together", [Problem("", f"two are called `{twice[0]}`", "rename a folder")])

    def num_bytes(self, num_parameters: int, source: Source) -> int:
        adapter = sum(path.stat().st_size for path in adapter_folder(source).iterdir() if path.is_file())
        return adapter + (0 if _is_fetched(source) else num_parameters * BYTES_PER_WEIGHT.get(source.dtype, 4))

    def write(self, subject: Subject, folder: Path) -> None:
        source = subject.source
        target = folder / ADAPTERS / source.name
        target.mkdir(parents=True)
        copy_adapter(source, target)
        source.tokenizer.save(target)

    def write_all(self, subjects: Sequence[Subject], folder: Path) -> None:
        import torch
        from torch import nn

        super().write_all(subjects, folder)
        first = subjects[0].source
        if not _is_fetched(first):
            base = first.original()
            nn.Module.to(base, getattr(torch, first.dtype))
            save_model(base, first.tokenizer, folder / BASE)
        for subject in subjects:
            _name_base(folder / ADAPTERS / subject.source.name / CONFIG_FILE, subject.source)
        script = folder / SCRIPT
        line = launch_line([subject.source for subject in subjects])
        script.write_text(f'#!/bin/sh\ncd "$(dirname "$0")"\nexec {line}\n', encoding="utf-8")
        script.chmod(0o755)

    def verify(self, subject: Subject, folder: Path) -> Sequence[Check]:
        """PEFT alone, on the base it was trained on; vLLM itself needs a GPU."""
        from peft import PeftModel

        source = subject.source
        loaded = PeftModel.from_pretrained(source.underlying(), folder / ADAPTERS / source.name).eval()
        found = compare(subject.expected, logits_on(loaded, source.probe))
        is_equal = found.kl < MAX_KL and found.argmax_agreement == 1.0
        return [Check(f"adapter {source.name}, loaded by PEFT", is_equal, _base_note(source), found)]

    def verify_all(self, subjects: Sequence[Subject], folder: Path) -> Sequence[Check]:
        served = Check("the folder, served by vLLM", None, "vLLM was not run: serve.sh runs it")
        return [*super().verify_all(subjects, folder), served]

    def stored_dtype(self, source: Source) -> str:
        return source.dtype

    def usage(self, name: str) -> str:
        return "```sh\n./serve.sh\ncurl http://127.0.0.1:8000/v1/models\n```\n\nRequests name an adapter, or the base, as their `model`."

    def next_commands(self, output: Path) -> Sequence[str]:
        return [f"{output}/{SCRIPT}", f"ftcli serve {output / BASE} --adapter NAME={output / ADAPTERS}/NAME"]


def launch_line(sources: Sequence[Source]) -> str:
    """The command that serves the folder it is run in."""
    first = sources[0]
    base = str(first.base) if _is_fetched(first) else f"./{BASE}"
    rank = max(_rank(source) for source in sources)
    ranks = next(allowed for allowed in RANKS if allowed >= rank)
    modules = " ".join(shlex.quote(f"{source.name}=./{ADAPTERS}/{source.name}") for source in sources)
    options = f"--enable-lora --max-lora-rank {ranks} --max-loras {len(sources)} --lora-modules {modules}"
    return f"vllm serve {shlex.quote(base)} --host 127.0.0.1 --port 8000 {options}"


def _unservable(source: Source) -> list[str]:
    """What of the adapter vLLM does not compute."""
    config = _config(source)
    found = []
    if config.get("peft_type") != "LORA":
        found.append(f"it is of kind `{config.get('peft_type')}` (kinds: LORA)")
    if config.get("use_dora"):
        found.append("it is DoRA, whose magnitudes vLLM does not apply")
    if config.get("modules_to_save"):
        found.append(f"it brings modules of its own: {', '.join(config['modules_to_save'])}")
    if (needed := needs_another_base(adapter_folder(source))) is not None:
        found.append(f"{needed}, and vLLM serves the base as it is")
    if config.get("bias", "none") != "none":
        found.append("it trains biases")
    if config.get("alpha_pattern") or len({config.get("r"), *(config.get("rank_pattern") or {}).values()}) > 1:
        found.append("its layers have different ranks or scalings")
    if _rank(source) > RANKS[-1]:
        found.append(f"its rank {_rank(source)} is above {RANKS[-1]}")
    return found


def _rank(source: Source) -> int:
    return int(_config(source).get("r") or 0)


def _config(source: Source) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((adapter_folder(source) / CONFIG_FILE).read_text(encoding="utf-8"))
    return config


def _name_base(path: Path, source: Source) -> None:
    """The adapter names the base that lies beside it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    name = source.base if _is_fetched(source) else f"../../{BASE}"
    path.write_text(json.dumps(config | {"base_model_name_or_path": name}, indent=2) + "\n", encoding="utf-8")


def _is_fetched(source: Source) -> bool:
    """The server fetches the base from the hub by its name."""
    return source.base is not None and is_hub_id(source.base)


def _base_note(source: Source) -> str:
    return "trained on a quantised base, and served on the original: another model" if source.is_quantised else ""
