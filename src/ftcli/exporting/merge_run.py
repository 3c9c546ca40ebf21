"""A run's adapter folded into its base: an ordinary model folder, proven to be the adapter's equal before it gets its name.

Everything is compared in float32, whatever is written: first the merged model with base and adapter, then what the files hold,
loaded afresh, with what was merged. Only then is the folder renamed to its final name.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ftcli.errors import GateError, Problem, RequestError, UsageError
from ftcli.exporting.difference import Difference, compare, logits_on
from ftcli.exporting.finite import require_finite, require_range
from ftcli.exporting.source import Source, adapter_source, chosen_device, listed_steps, run_source
from ftcli.files import check_new_folder, file_hashes, new_folder, sha256_of, write_json, write_text
from ftcli.models.locate import is_on_hub
from ftcli.models.quantisation import Quantization
from ftcli.models.settings import Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ftcli.methods.adapter import MergeTarget
    from ftcli.models.generate import Progress

MAX_KL = 1e-6  # nats per token; float32 products of merged and of separate weights differ by about 1e-8
_TARGETS = ("dequantised", "original", "requantised")


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was merged, and how equal it is."""

    output: str
    target: str
    dtype: str
    checkpoint: str | None
    difference: Difference
    """Merged in float32, from base and adapter."""
    written: Difference
    """The files, loaded afresh, from base and adapter: with the rounding to `dtype`."""
    targets: dict[str, Difference]
    """Other targets, where they were asked for."""

    def line(self) -> str:
        rounding = "" if self.dtype == "float32" else f"; rounded to {self.dtype}: {self.written.line()}"
        return f"merged = attached: {self.difference.line()}{rounding}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def merge_run(
    run_folder: Path,
    output: Path,
    *,
    target: str = "dequantised",
    checkpoint: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    compare_targets: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge a run's result, or one of its checkpoints, into its base and write an ordinary model folder at `output`.

    Args:
        target: for a quantised base: `dequantised` equals the adapter; `original` and `requantised` are other models, and measured.
        checkpoint: `best`, `last`, or a step; None is the run's result.
        dtype: of the weights written; `auto` is that of the base's checkpoint.
        compare_targets: measure the other targets, too.

    Raises:
        RequestError: no such run, checkpoint or target.
        GateError: the merged model is not the adapter's equal; nothing is left at `output`.
    """
    from ftcli.recipe.load import load_recipe

    if not (run_folder / "recipe.resolved.yaml").is_file():
        hint = "for an adapter without a run: ftcli merge --base BASE --adapter DIR -o OUT"
        raise UsageError(f"`{run_folder}` is not a run folder: it has no recipe.resolved.yaml", hint=hint)
    recipe = load_recipe(run_folder / "recipe.resolved.yaml").recipe
    if checkpoint is None and not (run_folder / recipe.method.artefact).is_dir():
        hint = f"ftcli train --resume goes on with it, or --checkpoint takes a step: {listed_steps(run_folder)}"
        raise RequestError(f"`{run_folder}` is not finished: it has no {recipe.method.artefact}/", hint=hint)
    job = run_source(recipe, run_folder, checkpoint, chosen_device(device))
    return _merge(job, output, target, checkpoint, dtype, compare_targets, progress)


def merge_folder(
    base: str,
    adapter: Path,
    output: Path,
    *,
    quantization: Quantization | None = None,
    target: str = "dequantised",
    dtype: str = "auto",
    device: str = "auto",
    compare_targets: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge any LoRA adapter in PEFT's layout into `base`.

    Args:
        base: builtin:NAME, a local folder, or a hub id.
        quantization: how the base was stored when the adapter was trained; None for not at all.

    Raises:
        RequestError: base or adapter cannot be loaded, or do not fit.
        GateError: the merged model is not the adapter's equal; nothing is left at `output`.
    """
    if not adapter.is_dir():
        raise UsageError(f"`{adapter}` is no folder with an adapter")
    job = adapter_source(adapter, base, chosen_device(device), quantization)
    return _merge(job, output, target, None, dtype, compare_targets, progress)


def _merge(
    job: Source, output: Path, target: str, checkpoint: str | None, dtype: str, compare_targets: bool, progress: Progress | None
) -> MergeReport:
    """Measure, merge, write, read back, compare, rename."""
    from torch import nn

    from ftcli.exporting.kept_probe import write_kept_logits
    from ftcli.merging.engine import working_folder
    from ftcli.merging.hold import held
    from ftcli.models.load import save_model
    from ftcli.models.quiet import quiet_libraries

    _check_request(job, output, target)
    say = progress.update if progress is not None else lambda done, total, what: None
    with quiet_libraries(), held(working_folder(output), output):
        check_new_folder(output)  # another may have ended while this one began
        say(0, 4, "load base and adapter")
        module = job.attached()
        require_finite(module, "the merge cannot be made")
        expected = logits_on(module, job.probe)
        say(1, 4, "merge")
        merged = _merged(job, module, cast("MergeTarget", target))
        del module
        difference = compare(expected, logits_on(merged, job.probe))
        _gate(difference, target)
        others = [other for other in _TARGETS if other != target] if compare_targets and job.is_quantised else []
        targets = {
            other: compare(expected, logits_on(_merged(job, job.attached(), cast("MergeTarget", other)), job.probe)) for other in others
        }
        say(2, 4, "write")
        stored = _output_dtype(job, dtype)
        require_range(merged.named_parameters(), str(stored).removeprefix("torch."), "the merge cannot be made")
        nn.Module.to(merged, stored)
        with new_folder(output) as partial:
            save_model(merged, job.tokenizer, partial)
            say(3, 4, "read back and compare")
            found = _prove_written(merged, job, partial)
            written = compare(expected, found)
            report = MergeReport(str(output), target, str(merged.dtype).removeprefix("torch."), checkpoint, difference, written, targets)
            write_kept_logits(partial, job.probe, found)
            write_json(partial / "manifest.json", {**_manifest(report, job), "files": file_hashes(partial)})
            write_text(partial / "README.md", _card(report, job))
        say(4, 4, "merge")
    return report


def _check_request(job: Source, output: Path, target: str) -> None:
    if target not in _TARGETS:
        raise UsageError(f"unknown merge target `{target}`", hint=f"targets: {', '.join(_TARGETS)}")
    if target != "dequantised" and not job.is_quantised:
        raise UsageError(f"target `{target}` is for a quantised base, and this one is not", hint="leave --target out")
    check_new_folder(output)


def _merged(job: Source, module: nn.Module, target: MergeTarget) -> PreTrainedModel:
    if target == "dequantised":
        return job.merge(module)
    from ftcli.methods.adapter import merge_adapter

    return merge_adapter(module, target, job.original() if target == "original" else None)


def _output_dtype(job: Source, dtype: str) -> torch.dtype:
    """The dtype asked for, or that of the checkpoint the base was loaded from."""
    import torch

    dtype = job.dtype if dtype == "auto" else dtype
    chosen = getattr(torch, dtype, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise UsageError(f"unknown dtype `{dtype}`", hint="float32, bfloat16, float16")
    return chosen


def _gate(difference: Difference, target: str) -> None:
    """Other targets than the dequantised base are other models; they are measured, not refused."""
    if target == "dequantised" and not (difference.kl < MAX_KL and difference.argmax_agreement == 1.0):
        problem = Problem("merge", f"{difference.line()} (must be below {MAX_KL:.0e} and 100 %)", "nothing was written")
        raise GateError("the merged model is not the adapter's equal", [problem])


def _prove_written(merged: PreTrainedModel, job: Source, folder: Path) -> Tensor:
    """Logits of what the files hold; every tensor must be bit for bit what was merged."""
    import torch

    from ftcli.models.classifier import is_classifier
    from ftcli.models.load import load_model
    from ftcli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    head: Literal["own"] | None = "own" if is_classifier(merged) else None
    loaded = load_model(Model(base=str(folder)), tokenizer, dtype=merged.dtype, device=job.device, head=head)
    ours, theirs = dict(merged.named_parameters()), dict(loaded.named_parameters())
    different = sorted(ours.keys() ^ theirs.keys())
    different += [name for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])]
    if different:
        raise GateError("the files do not hold what was merged", [Problem("merge", f"tensors that differ: {', '.join(different[:10])}")])
    return logits_on(loaded, job.probe)


def _manifest(report: MergeReport, job: Source) -> dict[str, Any]:
    from ftcli.training.manifest import versions

    return {
        "kind": "merge",
        "name": job.name,
        "base": job.base,
        "target": report.target,
        "dtype": report.dtype,
        "checkpoint": report.checkpoint,
        "source": job.reference,
        "inputs": {name: sha256_of(path) for name, path in job.inputs.items()},
        "versions": versions(),
        "proofs": [
            {"name": "merged = attached", "passed": report.target == "dequantised", "detail": report.difference.line()},
            {"name": "written = merged", "passed": True, "detail": "every tensor bit for bit"},
        ],
        "difference": asdict(report.difference),
        "written": asdict(report.written),
        "targets": {name: asdict(difference) for name, difference in report.targets.items()},
    }


def _card(report: MergeReport, job: Source) -> str:
    """The model card; it names no folder of this machine."""
    is_hub_id = job.base is not None and is_on_hub(job.base)
    base = "random weights" if job.base is None else job.base if is_hub_id or job.base.startswith("builtin:") else Path(job.base).name
    front = ["---", *([f"base_model: {job.base}", "base_model_relation: finetune"] if is_hub_id else [])]
    front += ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- ftcli", "---"]
    rows = {f"merged into the {report.target} base, float32": report.difference, f"as written, {report.dtype}": report.written} | {
        f"target {name}, for comparison": difference for name, difference in report.targets.items()
    }
    table = ["| model | KL (nats per token) | most likely token the same |", "|---|---|---|"]
    table += [f"| {name} | {row.kl:.1e} | {100 * row.argmax_agreement:.2f} % of {row.num_tokens} |" for name, row in rows.items()]
    kind = "with the adapter of" if report.target == "dequantised" else f"(target: {report.target}) with the adapter of"
    return "\n".join(
        [
            *front,
            "",
            f"# {job.name}",
            "",
            f"`{base}` {kind} `{job.name}` folded into its weights, in {report.dtype}. An ordinary model folder:",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained(".")',
            'tokenizer = AutoTokenizer.from_pretrained(".")',
            "```",
            "",
            "Measured against base and adapter, not merged, on a probe:",
            "",
            *table,
            "",
        ]
    )
