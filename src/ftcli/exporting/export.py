"""A run, an adapter or a model in the form that the next tool loads, loaded back by that tool before it gets its name.

Refusals come first (the format, the disk), then the weights: base and adapter are merged in float32 and compared, written into a
folder without a name, and what was written is loaded by its own runtime and compared with base and adapter on a probe.
"""

from __future__ import annotations

import json
import math
import operator
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import GateError, Problem, RequestError, UsageError
from ftcli.exporting.checks import Check
from ftcli.exporting.difference import compare, logits_on
from ftcli.exporting.export_card import base_name, export_card
from ftcli.exporting.finite import require_finite, require_range
from ftcli.exporting.formats.format import Format, Subject
from ftcli.exporting.held_folder import new_held_folder
from ftcli.exporting.merge_run import MAX_KL
from ftcli.exporting.source import Source, open_source, require_plain
from ftcli.files import check_new_folder, file_hashes, sha256_of, write_json, write_text

if TYPE_CHECKING:
    from ftcli.models.generate import Progress

SPARE = 1.05  # of the bytes an export is expected to take


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was exported, and how equal it is."""

    output: str
    kind: str
    dtype: str
    num_bytes: int
    checks: tuple[Check, ...]
    next_commands: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return {
            "output": self.output,
            "format": self.kind,
            "dtype": self.dtype,
            "num_bytes": self.num_bytes,
            "checks": [check.to_json() for check in self.checks],
            "next": list(self.next_commands),
        }


def export(
    targets: Sequence[str], form: Format, output: Path, *, device: str = "auto", to_hub: bool = False, progress: Progress | None = None
) -> ExportReport:
    """Write `targets` as `form` at `output`.

    Args:
        targets: runs, checkpoints, adapter or model folders, builtin:NAME, or hub ids; one, but for formats that hold several.
        to_hub: the folder is going to be read on other machines.

    Raises:
        RequestError: there is no such target, the format cannot hold it, the disk has no room, or another process writes there.
        GateError: what was written is not the source's equal; nothing is left at `output`.
    """
    if form.single and len(targets) != 1:
        raise UsageError(f"`{form.kind}` holds one model, {len(targets)} are given", hint="export them one by one, or `--to vllm`")
    check_new_folder(output)
    from ftcli.models.quiet import quiet_libraries

    say = progress.update if progress is not None else lambda done, total, what: None
    with quiet_libraries():
        say(0, 4, "look at the source")
        sources = [open_source(target, device) for target in targets]
        for source in sources:
            if form.is_merged:
                require_plain(source)
            form.check(source)
            if to_hub:
                form.check_portable(source)
        form.check_together(sources)
        check_disk(output, _num_bytes(form, sources))
        with new_held_folder(output) as partial:
            say(1, 4, "load")
            subjects = [_loaded(source, form) for source in sources]
            say(2, 4, "write")
            form.write_all([subject for subject, _ in subjects], partial)
            say(3, 4, "load back and compare")
            checks = [check for _, found in subjects for check in found]
            checks += form.verify_all([subject for subject, _ in subjects], partial)
            _gate(form, checks)
            report = _report(form, sources, partial, output, checks)
            write_json(partial / "manifest.json", {**_manifest(report, sources, form), "files": file_hashes(partial)})
            write_text(partial / "README.md", export_card(report, sources, form))
        say(4, 4, "export")
    return report


def check_disk(output: Path, num_bytes: int) -> None:
    """Refuse an export that the disk has no room for.

    Raises:
        RequestError: less than `num_bytes` and a little more are free.
    """
    existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < num_bytes * SPARE:
        what = f"about {num_bytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        raise RequestError(
            "the disk has no room for the export", [Problem(str(existing), what, "free some, or choose another folder with -o")]
        )


def _num_bytes(form: Format, sources: Sequence[Source]) -> int:
    own = sum(form.num_bytes(num_parameters(source), source) for source in sources)
    return own + form.shared_bytes(num_parameters(sources[0]), sources[0])


def num_parameters(source: Source) -> int:
    """Weights of the model, from the headers of its files; 0 where there are none yet (random weights under an adapter)."""
    files = [path for name, path in source.inputs.items() if path.suffix == ".safetensors" and name.startswith("base/")]
    files = files or [path for path in source.inputs.values() if path.suffix == ".safetensors"]
    return sum(_weights_in(path) for path in files)


def _weights_in(path: Path) -> int:
    """Numbers in a safetensors file, from its header.

    Raises:
        RequestError: the header cannot be read.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return sum(math.prod(map(operator.index, entry["shape"])) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, MemoryError, OverflowError) as error:
        raise RequestError("the weights cannot be read", [Problem(str(path), "is not a safetensors file")]) from error


def _loaded(source: Source, form: Format) -> tuple[Subject, list[Check]]:
    """The source as the format wants it, and the proof of the merge."""
    module = source.attached()
    require_finite(module, "the export cannot be made")
    expected = logits_on(module, source.probe)
    if not form.is_merged:
        return Subject(source, module, expected), []
    merged = source.merge(module)
    del module
    require_range(merged.named_parameters(), form.stored_dtype(source), "the export cannot be made")
    found = compare(expected, logits_on(merged, source.probe))
    is_equal = found.kl < MAX_KL and found.argmax_agreement == 1.0
    return Subject(source, merged, expected), [Check("merged = attached, float32", is_equal, "", found)]


def _gate(form: Format, checks: Sequence[Check]) -> None:
    failed = [check for check in checks if check.passed is False or (check.difference is not None and not check.difference.is_number)]
    if failed:
        problems = [Problem(form.kind, check.line(), "nothing was written") for check in failed]
        raise GateError("the export is not its source's equal", problems)


def _report(form: Format, sources: Sequence[Source], partial: Path, output: Path, checks: Sequence[Check]) -> ExportReport:
    num_bytes = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    commands = tuple(form.next_commands(output))
    return ExportReport(str(output), form.kind, form.stored_dtype(sources[0]), num_bytes, tuple(checks), commands)


def _manifest(report: ExportReport, sources: Sequence[Source], form: Format) -> dict[str, Any]:
    """What went in and what was found; it names no folder of this machine."""
    from ftcli.training.manifest import versions

    return {
        "kind": "export",
        "format": report.kind,
        "dtype": report.dtype,
        "sources": [
            {
                "name": source.name,
                "base": base_name(source.base),
                "source": base_name(source.reference) if source.reference is not None else source.name,
                "inputs": {name: sha256_of(path) for name, path in source.inputs.items()},
            }
            for source in sources
        ],
        **({} if form.data is None else {"data": {form.data.name: sha256_of(form.data)}}),
        "versions": versions(),
        "checks": [check.to_json() for check in report.checks],
    }
