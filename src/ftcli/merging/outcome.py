"""A merge from its recipe to a model folder: plan, carry out, write what belongs around the weights, prove, rename."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ftcli.errors import GateError, UsageError
from ftcli.files import check_new_folder, file_hashes, sync_folder, write_exact_json, write_json, write_text
from ftcli.merging.cut_alike import cut_warnings
from ftcli.merging.documents import read_object
from ftcli.merging.engine import JOURNAL, Carried, Say, carry_out, working_folder
from ftcli.merging.hold import clear, held, is_held
from ftcli.merging.inputs import CARRIED_ON, statistics_files
from ftcli.merging.methods.method import NoMean
from ftcli.merging.plan import SHARD_BYTES, Plan, plan_merge
from ftcli.merging.proof import Proof, prove_attached, prove_forward, prove_written
from ftcli.merging.recipe import load_merge_recipe
from ftcli.merging.remote import download_bytes, fetched
from ftcli.merging.stored import INDEX_FILE
from ftcli.models.tokenizer import TOKENIZER_FILES
from ftcli.units import format_bytes, format_seconds

MANIFEST, CARD, RECIPE_COPY = "manifest.json", "README.md", "merge_recipe.yaml"
_PACKAGES = ("ftcli", "numpy", "torch", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True)
class MergeOutcome:
    """A model that was merged."""

    output: Path
    method: str
    models: tuple[str, ...]
    num_tensors: int
    num_parameters: int
    num_unchanged: int
    num_resumed: int
    seconds: float
    proofs: tuple[Proof, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "output": str(self.output)}


def merge_models(
    recipe_path: Path,
    output: Path,
    *,
    threads: int | None = None,
    resume: bool = False,
    verify: bool = True,
    shard_bytes: int = SHARD_BYTES,
    say: Say | None = None,
) -> MergeOutcome:
    """Merge the models of a recipe into a model folder at `output`, which appears only when it is whole and proven.

    Args:
        threads: tensors that are merged at once; None is one for each processor. The result does not depend on it.
        resume: go on with a merge that was interrupted.
        verify: load the result with transformers and run it once.
        shard_bytes: largest size of a file of weights.

    Raises:
        RecipeError: something is wrong with the recipe or with how the models fit; nothing was read in full.
        GateError: the result is not finite, or does not load; nothing is left at `output`.
    """
    threads = threads or len(os.sched_getaffinity(0))
    check_output(output)
    plan = plan_merge(load_merge_recipe(recipe_path), output, threads=threads, shard_bytes=shard_bytes)
    return carry_out_plan(plan, output, threads=threads, resume=resume, verify=verify, say=say)


def check_output(output: Path) -> None:
    """
    Raises:
        UsageError: something is at `output` already, or nothing can be made there.
    """
    check_new_folder(output)


def carry_out_plan(plan: Plan, output: Path, *, threads: int, resume: bool, verify: bool, say: Say | None = None) -> MergeOutcome:
    """As `merge_models`, of a plan."""
    folder = working_folder(output)
    _require_journal(folder, resume)
    with held(folder, output):
        # another merge may have ended while this one was planned
        check_output(output)
        _require_journal(folder, resume)
        return _carry_out(fetched(plan), folder, output, threads, resume, verify, say)


def _require_journal(folder: Path, resume: bool) -> None:
    if resume and not (folder / JOURNAL).is_file():
        raise UsageError(f"there is nothing to go on with: `{folder}` is not there", hint="leave --resume out")


def _carry_out(plan: Plan, folder: Path, output: Path, threads: int, resume: bool, verify: bool, say: Say | None) -> MergeOutcome:
    try:
        carried = carry_out(plan, folder, threads=threads, resume=resume, say=say)
        _write_around(plan, folder)
        proofs = [prove_written(plan, folder)]
        if verify:
            proofs.append(prove_forward(plan, folder))
            proofs += prove_attached(plan, folder)
    except (GateError, NoMean):
        clear(folder)
        raise
    outcome = MergeOutcome(
        output,
        plan.recipe.method.name,
        tuple(source.reference for source in plan.sources),
        carried.num_tensors,
        sum(tensor.size for tensor in plan.tensors),
        carried.num_unchanged,
        carried.num_resumed,
        carried.seconds,
        tuple(proofs),
        (*plan.warnings, *cut_warnings(plan)),
    )
    write_json(folder / MANIFEST, {**_manifest(plan, carried, outcome), "files": file_hashes(folder, left_out=(JOURNAL,))})
    write_text(folder / CARD, _card(plan, outcome))
    (folder / JOURNAL).unlink()
    sync_folder(folder)
    if output.exists():
        output.rmdir()  # it is empty: this was looked at first
    folder.rename(output)
    return outcome


def left_behind(output: Path) -> str | None:
    """What is left of a merge that did not come to its end, and what can be done with it; None where nothing is."""
    folder = working_folder(output)
    if not (folder / JOURNAL).is_file() or is_held(folder):
        return None
    keeps = f"`{folder}` keeps what was merged: --resume goes on with it while the recipe and its files are as they were"
    return f"{keeps}, without it the merge begins anew; removing the folder is safe"


def _write_around(plan: Plan, folder: Path) -> None:
    """Everything of a model folder that is not weights."""
    write_exact_json(folder / "config.json", plan.config)
    write_text(folder / RECIPE_COPY, plan.recipe.text)
    if len(plan.shards) > 1:
        weights = {tensor.name: plan.shards[tensor.shard].name for tensor in plan.tensors}
        size = sum(tensor.num_bytes for tensor in plan.tensors)
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weights})
    donor = plan.sources[plan.donor]
    for pattern in CARRIED_ON:
        for path in donor.folder.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    if plan.vocabulary is not None:
        plan.vocabulary.write(folder)
        if plan.vocabulary.special.is_needed and (folder / "generation_config.json").is_file():
            generation = read_object(folder / "generation_config.json")
            plan.vocabulary.special.renumber(generation)
            write_exact_json(folder / "generation_config.json", generation)
    else:
        copy_tokenizer(donor.tokenizer_folder, folder)
    if (template := _template(plan)) is not None:
        write_text(folder / "chat_template.jinja", template)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy every file that belongs to a tokenizer."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _template(plan: Plan) -> str | None:
    """The chat template that the recipe asks for; None is the tokenizer's own."""
    asked = plan.recipe.chat_template
    if asked is None or "{" in asked:
        return asked
    if asked == "auto":
        found = Counter(text for source in plan.sources if (text := _template_of(source.tokenizer_folder)) is not None)
        return found.most_common(1)[0][0] if found else None
    from ftcli.models.templates import NAMES, own_template

    if asked in NAMES:
        return own_template(asked, adds_bos=False, has_chatml_tokens=True)
    from ftcli.merging.templates import TEMPLATES

    return TEMPLATES[asked]


def _template_of(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "tokenizer_config.json").is_file():
        text = read_object(folder / "tokenizer_config.json").get("chat_template")
        return text if isinstance(text, str) else None
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _manifest(plan: Plan, carried: Carried, outcome: MergeOutcome) -> dict[str, Any]:
    return {
        "kind": "merge",
        "method": outcome.method,
        "models": list(outcome.models),
        "base_model": plan.recipe.base,
        "seed": plan.recipe.seed,
        "recipe": plan.recipe.document.data,
        "inputs": carried.input_hashes,
        "versions": {package: _version(package) for package in _PACKAGES},
        "num_tensors": outcome.num_tensors,
        "num_parameters": outcome.num_parameters,
        "num_unchanged": outcome.num_unchanged,
        "warnings": list(outcome.warnings),
        "proofs": [asdict(proof) for proof in outcome.proofs],
    }


def _card(plan: Plan, outcome: MergeOutcome) -> str:
    """The model card; it names no folder of this machine."""
    hub_ids = list(dict.fromkeys(hub_id for source in plan.sources for hub_id in source.hub_ids))
    front = ["---"]
    if hub_ids:
        front += ["base_model:", *(f"- {name}" for name in hub_ids), "base_model_relation: merge"]
    front += ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- merge", "- ftcli", "---"]
    rows = [f"| {source.shown} | {'base' if source.reference == plan.recipe.base else 'model'} |" for source in plan.sources]
    recipe = plan.recipe.text
    folders = {folder for source in plan.sources for folder in source.folders} | set(statistics_files(plan.recipe))
    for name in sorted(folders, key=len, reverse=True):
        recipe = recipe.replace(name, Path(name).name or name)
    proofs = [f"- {proof.name}: {proof.detail}" for proof in outcome.proofs]
    body = [
        f"# {outcome.output.name}",
        "",
        f"Merged by `{outcome.method}` ({plan.recipe.method.help}) from:",
        "",
        "| what | as |",
        "|---|---|",
        *rows,
        "",
        "Proofs:",
        "",
        *proofs,
        "",
        "The recipe:",
        "",
        "```yaml",
        recipe.rstrip(),
        "```",
        "",
        "SHA-256 of every file that went in is in manifest.json.",
        "",
    ]
    return "\n".join([*front, "", *body])


def plan_lines(plan: Plan) -> list[str]:
    """The plan in words: sizes first, then how every tensor is made, the same of many layers in one line."""
    import re

    num_parameters = sum(tensor.size for tensor in plan.tensors)
    lines = [
        f"{plan.recipe.method.name} of {len(plan.sources)} models: {len(plan.tensors)} tensors, {num_parameters:,} parameters",
        f"reads {format_bytes(plan.read_bytes)}, writes {format_bytes(plan.write_bytes)} in {len(plan.shards)} files, "
        f"needs about {format_bytes(plan.memory_bytes)} of memory",
        *([f"fetches {format_bytes(download_bytes(plan.sources))} from the hub first"] if download_bytes(plan.sources) else []),
        *(f"warning: {warning}" for warning in (*plan.warnings, *cut_warnings(plan))),
        "",
    ]
    groups: dict[tuple[str, ...], list[str]] = {}
    for tensor in plan.tensors:
        template = re.sub(r"\.\d+\.", ".*.", tensor.name, count=1)
        names = " + ".join(tensor.labels) if tensor.labels and not tensor.is_copy else f"copy of {_origin(plan, tensor.inputs[0])}"
        names = re.sub(r"\.\d+\.", ".*.", names, count=1) if tensor.is_copy else names
        key = (template, f"{list(tensor.shape)} {tensor.dtype}", names, _said(tensor.settings))
        groups.setdefault(key, []).append(tensor.name)
    for (template, shape, names, said), members in groups.items():
        shown = members[0] if len(members) == 1 else template
        lines.append(f"{shown}{f' (x{len(members)})' if len(members) > 1 else ''}  {shape}  {names}{f'  {said}' if said else ''}")
    return lines


def _origin(plan: Plan, item: Any) -> str:
    return f"{plan.sources[item.source].reference}: {item.name}"


def _said(settings: Mapping[str, Any]) -> str:
    def word(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)

    return " ".join(
        f"{name}={','.join(map(word, value)) if isinstance(value, tuple) else word(value)}"
        for name, value in settings.items()
        if value is not None
    )


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan for programs."""
    return {
        "method": plan.recipe.method.name,
        "models": [source.reference for source in plan.sources],
        "num_parameters": sum(tensor.size for tensor in plan.tensors),
        "read_bytes": plan.read_bytes,
        "download_bytes": download_bytes(plan.sources),
        "write_bytes": plan.write_bytes,
        "memory_bytes": plan.memory_bytes,
        "warnings": [*plan.warnings, *cut_warnings(plan)],
        "config": plan.config,
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "file": plan.shards[tensor.shard].name,
                "inputs": [{"model": plan.sources[item.source].reference, "tensor": item.name} for item in tensor.inputs],
                "base": None if tensor.base is None else plan.sources[tensor.base.source].reference,
                "is_copy": tensor.is_copy,
                "settings": {name: list(value) if isinstance(value, tuple) else value for name, value in tensor.settings.items()},
            }
            for tensor in plan.tensors
        ],
    }


def outcome_lines(outcome: MergeOutcome) -> list[str]:
    """The result in words."""
    lines = [f"warning: {warning}" for warning in outcome.warnings]
    unchanged = f", {outcome.num_unchanged} of them the base's own, bit for bit" if outcome.num_unchanged else ""
    resumed = f", {outcome.num_resumed} were there already" if outcome.num_resumed else ""
    lines.append(f"merged {outcome.num_tensors} tensors in {format_seconds(outcome.seconds)}{unchanged}{resumed}")
    lines += [f"{'proof' if proof.passed else 'not proven'}: {proof.name}: {proof.detail}" for proof in outcome.proofs]
    return [*lines, f"model folder: {outcome.output}"]
