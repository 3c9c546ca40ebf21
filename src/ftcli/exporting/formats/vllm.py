"""One base with many adapters, laid out for vLLM, with the line that serves them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ftcli.errors import Problem, RequestError
from ftcli.exporting.checks import Check
from ftcli.exporting.difference import compare, logits_on
from ftcli.exporting.export_card import is_hub_id
from ftcli.exporting.formats.adapter import MAX_KL, adapter_config, adapter_folder, copy_adapter
from ftcli.exporting.formats.format import Format, Subject
from ftcli.exporting.formats.hf import BYTES_PER_WEIGHT, settle_stops
from ftcli.layout.model import inner_model
from ftcli.models.adapter_start import start_of
from ftcli.models.added_rows import needs_another_base
from ftcli.models.load import save_model

if TYPE_CHECKING:
    from ftcli.exporting.source import Source

SCRIPT, BASE, ADAPTERS, TEMPLATE = "serve.sh", "base", "adapters", "chat_template.jinja"
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
        first = sources[0]
        for source in sources:
            if _speech(source) != _speech(first):
                what = f"`{first.name}` and `{source.name}` have different chat templates or stop tokens, and vLLM has one for all"
                problem = Problem("", what, "export those that agree together")
                raise RequestError("the adapters cannot be served together", [problem])

    def num_bytes(self, num_parameters: int, source: Source) -> int:
        return sum(path.stat().st_size for path in adapter_folder(source).iterdir() if path.is_file()) + 2**20

    def shared_bytes(self, num_parameters: int, source: Source) -> int:
        return 0 if _is_fetched(source) else num_parameters * BYTES_PER_WEIGHT.get(source.dtype, 4)

    def write(self, subject: Subject, folder: Path) -> None:
        source = subject.source
        target = folder / ADAPTERS / source.name
        target.mkdir(parents=True)
        copy_adapter(source, target, str(source.base) if _is_fetched(source) else f"../../{BASE}")
        source.tokenizer.save(target)

    def write_all(self, subjects: Sequence[Subject], folder: Path) -> None:
        import torch
        from torch import nn

        super().write_all(subjects, folder)
        first = subjects[0].source
        model = inner_model(subjects[0].module)
        settle_stops(model, first.tokenizer)
        model.generation_config.save_pretrained(folder)
        if first.tokenizer.chat_template is not None:
            (folder / TEMPLATE).write_text(first.tokenizer.chat_template, encoding="utf-8")
        if not _is_fetched(first):
            base = first.original()
            settle_stops(base, first.tokenizer)
            nn.Module.to(base, getattr(torch, first.dtype))
            save_model(base, first.tokenizer, folder / BASE)
        script = folder / SCRIPT
        line = launch_line([subject.source for subject in subjects])
        script.write_text(f'#!/bin/sh\ncd "$(dirname "$0")"\nexec {line}\n', encoding="utf-8")
        script.chmod(0o755)

    def verify(self, subject: Subject, folder: Path) -> Sequence[Check]:
        """PEFT alone, on the base that is served; vLLM itself needs a GPU."""
        from peft import PeftModel

        source = subject.source
        name = f"adapter {source.name}, loaded by PEFT"
        loaded = PeftModel.from_pretrained(source.original(), folder / ADAPTERS / source.name).eval()
        found = compare(subject.expected, logits_on(loaded, source.probe))
        if source.is_quantised:
            return [Check(name, None, "trained on a quantised base, and served on the original: another model", found)]
        return [Check(name, found.kl < MAX_KL and found.argmax_agreement == 1.0, "", found)]

    def verify_all(self, subjects: Sequence[Subject], folder: Path) -> Sequence[Check]:
        served = Check("the folder, served by vLLM", None, "vLLM was not run: serve.sh runs it")
        return [*super().verify_all(subjects, folder), served]

    def stored_dtype(self, source: Source) -> str:
        return source.dtype

    def usage(self, name: str, source: Source) -> str:
        return "```sh\n./serve.sh\ncurl http://127.0.0.1:8000/v1/models\n```\n\nRequests name an adapter, or the base, as their `model`."

    def next_commands(self, output: Path) -> Sequence[str]:
        script, adapters = (shlex.quote(str(output / name)) for name in (SCRIPT, ADAPTERS))
        return [script, f"ftcli serve {adapters}/NAME"]


def launch_line(sources: Sequence[Source]) -> str:
    """The command that serves the folder it is run in."""
    first = sources[0]
    base = str(first.base) if _is_fetched(first) else f"./{BASE}"
    rank = max(_rank(source) for source in sources)
    ranks = next(allowed for allowed in RANKS if allowed >= rank)
    modules = " ".join(shlex.quote(f"{source.name}=./{ADAPTERS}/{source.name}") for source in sources)
    template = "" if first.tokenizer.chat_template is None else f" --chat-template ./{TEMPLATE}"
    options = f"--generation-config .{template} --enable-lora --max-lora-rank {ranks} --max-loras {len(sources)} --lora-modules {modules}"
    return f"vllm serve {shlex.quote(base)} --host 127.0.0.1 --port 8000 {options}"


def _unservable(source: Source) -> list[str]:
    """What of the adapter vLLM does not compute."""
    config = adapter_config(source)
    found = []
    if config.get("peft_type") != "LORA":
        found.append(f"it is of kind `{config.get('peft_type')}` (kinds: LORA)")
    if config.get("use_dora"):
        found.append("it is DoRA, whose magnitudes vLLM does not apply")
    if config.get("modules_to_save"):
        found.append(f"it brings modules of its own: {', '.join(config['modules_to_save'])}")
    if (needed := needs_another_base(adapter_folder(source))) is not None:
        found.append(f"{needed}, and vLLM serves the base as it is")
    if (start := start_of(config)) is not None:
        found.append(f"its start (`init_lora_weights: {start}`) is taken off the base, which vLLM leaves as it is")
    if config.get("bias", "none") != "none":
        found.append("it trains biases")
    if config.get("alpha_pattern") or len({config.get("r"), *(config.get("rank_pattern") or {}).values()}) > 1:
        found.append("its layers have different ranks or scalings")
    if _rank(source) > RANKS[-1]:
        found.append(f"its rank {_rank(source)} is above {RANKS[-1]}")
    return found


def _rank(source: Source) -> int:
    return int(adapter_config(source).get("r") or 0)


def _speech(source: Source) -> tuple[str | None, tuple[int, ...]]:
    """What vLLM takes from one tokenizer for the base and all adapters."""
    return source.tokenizer.chat_template, tuple(source.tokenizer.stop_ids)


def _is_fetched(source: Source) -> bool:
    """The server fetches the base from the hub by its name."""
    return source.base is not None and is_hub_id(source.base)
