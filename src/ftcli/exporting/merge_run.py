"""A run's adapter folded into its base: an ordinary model folder, proven to be the adapter's equal before it gets its name.

Everything is compared in float32, whatever is written: first the merged model with base and adapter, then what the files hold,
loaded afresh, with what was merged. Only then is the folder renamed to its final name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ftcli.errors import GateError, Problem, RequestError, UsageError
from ftcli.files import new_folder, sha256_of, write_json, write_text
from ftcli.models.quantisation import Quantization
from ftcli.models.settings import Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ftcli.methods.adapter import MergeTarget
    from ftcli.models.generate import Progress
    from ftcli.models.tokenizer import Tokenizer
    from ftcli.recipe.recipe import Recipe

MAX_KL = 1e-6  # nats per token; float32 products of merged and of separate weights differ by about 1e-8
NEAR_TIE = 1e-3  # two best log-probabilities nearer than this are no difference if they change places
_TARGETS = ("dequantised", "original", "requantised")
_PROBE_TOKENS, _PROBE_LENGTH, _ROWS_PER_SOURCE = 2048, 256, 8
_PROBE_LOGITS = 2**27  # at most so many numbers are kept, half a GiB
_COMPARED_ROWS = 64
_PROBE_TEXT = """The quick brown fox jumps over the lazy dog. "How many apples are left?" asked Ada; 12 - 7 = 5, so five.
def area(width: float, height: float) -> float:
    return width * height
{"name": "lamp", "price": 19.99, "colours": ["red", "blue"]}
Übung macht den Meister. El río corre hacia el mar. 春は曙。 Once upon a time there was a small village by the sea, and
in that village lived a clockmaker who could repair anything but time itself.
"""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one model is from another on the probe."""

    kl: float
    """Mean KL divergence, nats per token."""
    argmax_agreement: float
    """Share of tokens with the same most likely successor."""
    num_tokens: int

    def line(self) -> str:
        return f"KL {self.kl:.1e} nats per token, most likely token the same for {100 * self.argmax_agreement:.2f} % of {self.num_tokens}"


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


@dataclass(frozen=True)
class _Job:
    """Where the parts of a merge come from; every call of a loader gives a fresh object."""

    attached: Callable[[], nn.Module]
    """Base and adapter."""
    merge: Callable[[nn.Module], PreTrainedModel]
    original: Callable[[], PreTrainedModel]
    """The base before quantisation."""
    is_quantised: bool
    tokenizer: Tokenizer
    probe: list[list[int]]
    inputs: dict[str, Path]
    base: str | None
    dtype: str
    """Of the checkpoint the base was loaded from."""
    name: str
    device: str


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
        hint = f"ftcli train --resume goes on with it, or --checkpoint takes a step: {_listed_steps(run_folder)}"
        raise RequestError(f"`{run_folder}` is not finished: it has no {recipe.method.artefact}/", hint=hint)
    job = _run_job(recipe, run_folder, checkpoint, _device(device))
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
    from ftcli.methods.adapter import CONFIG_FILE, WEIGHTS_FILE, load_adapter, merge_adapter
    from ftcli.models.load import checkpoint_dtype, load_model
    from ftcli.models.locate import model_folder
    from ftcli.models.tokenizer import load_tokenizer

    if not adapter.is_dir():
        raise UsageError(f"`{adapter}` is no folder with an adapter")
    where = _device(device)
    tokenizer = load_tokenizer(str(adapter) if (adapter / "tokenizer.json").is_file() else base)
    model = Model(base=base)

    def load(stored: Quantization | None) -> PreTrainedModel:
        return load_model(model, tokenizer, quantization=stored, dtype="float32", device=where)

    job = _Job(
        attached=lambda: load_adapter(load(quantization), adapter),
        merge=merge_adapter,
        original=lambda: load(None),
        is_quantised=quantization is not None,
        tokenizer=tokenizer,
        probe=_probe(tokenizer, None),
        inputs={name: adapter / name for name in (CONFIG_FILE, WEIGHTS_FILE)} | _base_files(base, None),
        base=base,
        dtype=checkpoint_dtype(model_folder(base)),
        name=adapter.resolve().name,
        device=where,
    )
    return _merge(job, output, target, None, dtype, compare_targets, progress)


def _run_job(recipe: Recipe, run_folder: Path, checkpoint: str | None, device: str) -> _Job:
    from ftcli.methods.context import AttachContext
    from ftcli.models.load import load_model
    from ftcli.training.seeds import derive_seed

    method, seed = recipe.method, recipe.train.seed
    tokenizer = recipe.model.load_tokenizer()

    def load(quantization: Quantization | None) -> PreTrainedModel:
        return load_model(
            recipe.model, tokenizer, quantization=quantization, dtype="float32", device=device, seed=derive_seed(seed, "model")
        )

    artefact = run_folder / method.artefact
    kept = None if checkpoint is None else _checkpoint_folder(run_folder, checkpoint)

    def attached() -> nn.Module:
        base = load(method.quantization())
        if kept is None:
            return method.load(base, artefact)
        module = method.attach(base, AttachContext(seed=derive_seed(seed, "method"), restoring=True))
        _restore(module, kept)
        return module.eval()

    trained = artefact if kept is None else kept
    return _Job(
        attached=attached,
        merge=method.merge,
        original=lambda: load(None),
        is_quantised=method.quantization() is not None,
        tokenizer=tokenizer,
        probe=_probe(tokenizer, recipe),
        inputs={path.name: path for path in sorted(trained.iterdir()) if path.is_file()}
        | {"recipe.resolved.yaml": run_folder / "recipe.resolved.yaml"}
        | ({} if recipe.model.base is None else _base_files(recipe.model.base, recipe.model.revision)),
        base=recipe.model.base,
        dtype=_trained_dtype(recipe),
        name=recipe.name,
        device=device,
    )


def _trained_dtype(recipe: Recipe) -> str:
    """The dtype that the recipe asks for, else of the run's own weights or of the base's checkpoint."""
    from ftcli.models.load import checkpoint_dtype
    from ftcli.models.locate import model_folder

    model = recipe.model
    if model.dtype != "auto":
        return model.dtype
    if recipe.method.artefact == "model" or model.base is None:
        return "float32"
    return checkpoint_dtype(model_folder(model.base, model.revision))


def _restore(module: nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's weights into `module`."""
    from ftcli.training.checkpoint import load_trainable, verified_state

    verified_state(checkpoint)
    load_trainable(module, checkpoint)


def _checkpoint_folder(run_folder: Path, checkpoint: str) -> Path:
    """The folder of checkpoint `best`, `last`, `120` or `step-000120`."""
    import json

    from ftcli.training.checkpoint import Checkpoints

    checkpoints = Checkpoints(run_folder / "checkpoints", keep=1)
    steps = checkpoints.steps()
    step = None
    if checkpoint == "last" and steps:
        step = steps[-1]
    elif checkpoint == "best" and steps:
        state = json.loads((checkpoints.path(steps[-1]) / "progress.json").read_text(encoding="utf-8"))
        step = state["progress"].get("best_step")
    elif checkpoint.removeprefix("step-").isdecimal():
        step = int(checkpoint.removeprefix("step-"))
    if step not in steps or step is None:
        raise UsageError(f"no checkpoint `{checkpoint}` in {run_folder}", hint=f"checkpoints: {_listed_steps(run_folder)}")
    return checkpoints.path(step)


def _listed_steps(run_folder: Path) -> str:
    from ftcli.training.checkpoint import Checkpoints

    steps = Checkpoints(run_folder / "checkpoints", keep=1).steps()
    return ", ".join(map(str, steps)) or "none"


def _base_files(base: str, revision: str | None) -> dict[str, Path]:
    from ftcli.models.locate import model_folder

    return {f"base/{path.name}": path for path in sorted(model_folder(base, revision).glob("*.safetensors"))}


def _device(device: str) -> str:
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _merge(
    job: _Job, output: Path, target: str, checkpoint: str | None, dtype: str, compare_targets: bool, progress: Progress | None
) -> MergeReport:
    """Measure, merge, write, read back, compare, rename."""
    from torch import nn

    from ftcli.models.load import save_model
    from ftcli.models.quiet import quiet_libraries

    _check_request(job, output, target)
    say = progress.update if progress is not None else lambda done, total, what: None
    with quiet_libraries():
        say(0, 4, "load base and adapter")
        module = job.attached()
        expected = _logits(module, job.probe)
        say(1, 4, "merge")
        merged = _merged(job, module, cast("MergeTarget", target))
        del module
        difference = _compare(expected, _logits(merged, job.probe))
        _gate(difference, target)
        others = [other for other in _TARGETS if other != target] if compare_targets and job.is_quantised else []
        targets = {
            other: _compare(expected, _logits(_merged(job, job.attached(), cast("MergeTarget", other)), job.probe)) for other in others
        }
        say(2, 4, "write")
        nn.Module.to(merged, _output_dtype(job, dtype))
        with new_folder(output) as partial:
            save_model(merged, job.tokenizer, partial)
            say(3, 4, "read back and compare")
            written = _compare(expected, _prove_written(merged, job, partial))
            report = MergeReport(str(output), target, str(merged.dtype).removeprefix("torch."), checkpoint, difference, written, targets)
            write_json(partial / "manifest.json", _manifest(report, job))
            write_text(partial / "README.md", _card(report, job))
        say(4, 4, "merge")
    return report


def _check_request(job: _Job, output: Path, target: str) -> None:
    if target not in _TARGETS:
        raise UsageError(f"unknown merge target `{target}`", hint=f"targets: {', '.join(_TARGETS)}")
    if target != "dequantised" and not job.is_quantised:
        raise UsageError(f"target `{target}` is for a quantised base, and this one is not", hint="leave --target out")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"`{output}` exists already", hint="choose another folder for the merged model, or remove this one")


def _merged(job: _Job, module: nn.Module, target: MergeTarget) -> PreTrainedModel:
    if target == "dequantised":
        return job.merge(module)
    from ftcli.methods.adapter import merge_adapter

    return merge_adapter(module, target, job.original() if target == "original" else None)


def _output_dtype(job: _Job, dtype: str) -> torch.dtype:
    """The dtype asked for, or that of the checkpoint the base was loaded from."""
    import torch

    dtype = job.dtype if dtype == "auto" else dtype
    chosen = getattr(torch, dtype, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise UsageError(f"unknown dtype `{dtype}`", hint="float32, bfloat16, float16")
    return chosen


def _logits(module: nn.Module, probe: list[list[int]]) -> Tensor:
    """(tokens, vocabulary) float32 logits at every token of the probe, on the CPU."""
    import torch

    module.eval()
    device = next(module.parameters()).device
    with torch.no_grad():
        return torch.cat([module(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu() for ids in probe])


def _compare(expected: Tensor, found: Tensor) -> Difference:
    """KL(expected || found) and agreement of the most likely tokens, near ties of `expected` counted as equal.

    Args:
        expected: ``(tokens, vocabulary)`` logits.
        found: ``(tokens, vocabulary)`` logits.
    """
    kl_sum, num_agreeing = 0.0, 0
    for first, second in zip(expected.split(_COMPARED_ROWS), found.split(_COMPARED_ROWS), strict=True):
        ours, theirs = first.double().log_softmax(-1), second.double().log_softmax(-1)
        kl_sum += float((ours.exp() * (ours - theirs)).sum())
        best = theirs.argmax(-1, keepdim=True)
        num_agreeing += int((ours.max(-1).values - ours.gather(-1, best).squeeze(-1) <= NEAR_TIE).sum())
    return Difference(max(0.0, kl_sum) / len(expected), num_agreeing / len(expected), len(expected))


def _gate(difference: Difference, target: str) -> None:
    """Other targets than the dequantised base are other models; they are measured, not refused."""
    if target == "dequantised" and not (difference.kl < MAX_KL and difference.argmax_agreement == 1.0):
        problem = Problem("merge", f"{difference.line()} (must be below {MAX_KL:.0e} and 100 %)", "nothing was written")
        raise GateError("the merged model is not the adapter's equal", [problem])


def _prove_written(merged: PreTrainedModel, job: _Job, folder: Path) -> Tensor:
    """Logits of what the files hold; every tensor must be bit for bit what was merged."""
    import torch

    from ftcli.models.load import load_model
    from ftcli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    loaded = load_model(Model(base=str(folder)), tokenizer, dtype=merged.dtype, device=job.device)
    ours, theirs = dict(merged.named_parameters()), dict(loaded.named_parameters())
    different = sorted(ours.keys() ^ theirs.keys())
    different += [name for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])]
    if different:
        raise GateError("the files do not hold what was merged", [Problem("merge", f"tensors that differ: {', '.join(different[:10])}")])
    return _logits(loaded, job.probe)


def _probe(tokenizer: Tokenizer, recipe: Recipe | None) -> list[list[int]]:
    """Token ids to compare models on: the first rows of the run's own data, where they can still be read, and a fixed text."""
    rows = [tokenizer.encode(_PROBE_TEXT)[0]]
    if recipe is not None:
        from ftcli.data.prepare import look

        try:
            looks = look(recipe.data, tokenizer, _ROWS_PER_SOURCE)
        except RequestError:
            looks = []  # the data of an old run may be gone; the merge does not need them
        rows += [tree.tokens.tolist() for source in looks for tree in source.trees]
    rows = [row[:_PROBE_LENGTH] for row in rows if row]
    kept, num_tokens = [], 0
    for row in rows:
        if num_tokens < min(_PROBE_TOKENS, _PROBE_LOGITS // tokenizer.vocab_size):
            kept.append(row)
            num_tokens += len(row)
    return kept


def _manifest(report: MergeReport, job: _Job) -> dict[str, Any]:
    from ftcli.training.manifest import versions

    return {
        "kind": "merge",
        "name": job.name,
        "base": job.base,
        "target": report.target,
        "dtype": report.dtype,
        "checkpoint": report.checkpoint,
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


def _card(report: MergeReport, job: _Job) -> str:
    """The model card; it names no folder of this machine."""
    is_hub_id = job.base is not None and not job.base.startswith(("builtin:", "/", "."))
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
