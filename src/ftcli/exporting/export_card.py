"""README.md of an export: what it holds, how it is used, and how far it is from its source. It names no folder of this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftcli.exporting.checks import Check
    from ftcli.exporting.export import ExportReport
    from ftcli.exporting.formats.format import Format
    from ftcli.exporting.source import Source

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_RELATIONS = {"adapter": "adapter", "vllm": "adapter", "gguf": "quantized", "ollama": "quantized", "int8": "quantized", "int4": "quantized"}


def export_card(report: ExportReport, sources: Sequence[Source], form: Format) -> str:
    """The card as Markdown."""
    first = sources[0]
    names = ", ".join(f"`{source.name}`" for source in sources)
    return "\n".join(
        [
            *_front_matter(report.kind, first),
            "",
            f"# {first.name}",
            "",
            f"{names} on `{base_name(first.base)}`, exported as {report.kind} ({report.dtype}).",
            "",
            form.usage(Path(report.output).name, first),
            "",
            "Loaded back and compared with the source on a probe:",
            "",
            "| check | result | KL (nats per token) | most likely token the same | |",
            "|---|---|---|---|---|",
            *(_row(check) for check in report.checks),
            "",
        ]
    )


def base_name(base: str | None) -> str:
    """A base without the folders of this machine."""
    if base is None:
        return "random weights"
    return base if base.startswith("builtin:") or is_hub_id(base) else Path(base).name


def is_hub_id(reference: str) -> bool:
    """Can `reference` be a model on the hub, and is no folder here?"""
    return _HUB_ID.fullmatch(reference) is not None and not Path(reference).exists()


def _front_matter(kind: str, source: Source) -> list[str]:
    lines = ["---"]
    if source.base is not None and is_hub_id(source.base):
        lines += [f"base_model: {source.base}", f"base_model_relation: {_RELATIONS.get(kind, 'finetune')}"]
    library = {"adapter": "peft", "vllm": "vllm", "gguf": "gguf", "ollama": "gguf", "onnx": "onnx"}.get(kind, "transformers")
    return [*lines, f"library_name: {library}", "pipeline_tag: text-generation", "tags:", "- ftcli", f"- {kind}", "---"]


def _row(check: Check) -> str:
    result = {True: "passed", False: "failed", None: "not verified"}[check.passed]
    found = check.difference
    cells = ["-", "-"] if found is None else [f"{found.kl:.1e}", f"{100 * found.argmax_agreement:.2f} % of {found.num_tokens}"]
    return f"| {check.name} | {result} | {' | '.join(cells)} | {check.detail.replace('|', '/')} |"
