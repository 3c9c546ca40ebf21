"""The proofs of a training run, replayed one by one: a function each, and one line in `REPLAYS`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import FtcliError
from ftcli.reporting.found_run import MANIFEST, FoundRun, read_run
from ftcli.reporting.verify.replay import Replay, judged, replay_files, skipped

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ftcli.data.tree import TokenTree
    from ftcli.models.tokenizer import Tokenizer
    from ftcli.recipe.recipe import Recipe
    from ftcli.training.assemble import DataParts

LOSS_TOLERANCE = 1e-3
"""Nats per target, of the losses of a few rows; other devices add in another order."""
DAMAGED = (FtcliError, OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError)
"""What loading a file may raise that someone has changed; the proof fails and says it."""


@dataclass(eq=False)
class OpenedRun:
    """A run folder, and what of it has been loaded; each part once, when it is first asked for."""

    path: Path
    device_name: str = "auto"

    @cached_property
    def found(self) -> FoundRun:
        return read_run(self.path)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return self.found.manifest

    @cached_property
    def recipe(self) -> Recipe:
        from ftcli.recipe.load import load_recipe

        return load_recipe(self.path / "recipe.resolved.yaml").recipe

    @cached_property
    def artefact(self) -> Path:
        return self.path / self.recipe.method.artefact

    @cached_property
    def device(self) -> torch.device:
        import torch

        from ftcli.exporting.source import chosen_device

        return torch.device(chosen_device(self.device_name))

    @cached_property
    def probe(self) -> dict[str, Any]:
        from ftcli.training.probe import read_probe

        return read_probe(self.path)

    @cached_property
    def trees(self) -> list[TokenTree]:
        from ftcli.training.probe import tree_of

        return [tree_of(value) for value in self.probe["rows"]]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The one that was saved with the weights."""
        from ftcli.models.tokenizer import load_tokenizer

        return (
            load_tokenizer(str(self.artefact.resolve()))
            if (self.artefact / "tokenizer.json").is_file()
            else self.recipe.model.load_tokenizer()
        )

    @cached_property
    def data(self) -> DataParts:
        from ftcli.training.assemble import assemble_data

        return assemble_data(self.recipe, None)

    @cached_property
    def base_fingerprint(self) -> str:
        from ftcli.models.fingerprint import base_fingerprint
        from ftcli.training.assemble import load_base

        return base_fingerprint(load_base(self.recipe, self.recipe.model.load_tokenizer(), self.device))

    @cached_property
    def module(self) -> nn.Module:
        """The artefact on a fresh base."""
        from ftcli.models.added_rows import read_rows
        from ftcli.training.assemble import load_base

        base = load_base(self.recipe, self.recipe.model.load_tokenizer(), self.device)
        read_rows(base, self.artefact)
        return self.recipe.method.load(base, self.artefact).eval()


def verify_run(path: Path, device: str = "auto") -> list[Replay]:
    """Every proof of a run, replayed."""
    from ftcli.models.quiet import quiet_libraries

    run = OpenedRun(path, device)
    damaged = [what for what in run.found.damage if what.startswith(MANIFEST)]
    if damaged:
        # Nothing of it was written by anyone: to hold data and order against it would only say that they are others.
        return [Replay("manifest", "fails", f"{damaged[0]}: there is nothing to hold this run against")]
    replays = replay_files(path, run.manifest.get("files"), _artefact_name(run))
    with quiet_libraries():
        for name, replay in REPLAYS.items():
            try:
                found = replay(run)
            except DAMAGED as error:
                found = [Replay(name, "fails", _first_line(error))]
            replays += [found] if isinstance(found, Replay) else found
    return replays


def _artefact_name(run: OpenedRun) -> str:
    name = run.manifest.get("artefact")
    return name if isinstance(name, str) else "adapter"


def _first_line(error: BaseException) -> str:
    if isinstance(error, FtcliError):
        return "; ".join([error.summary, *(f"{problem.where}: {problem.what}" for problem in error.problems[:3])])
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _is_finished(run: OpenedRun) -> Replay:
    state = run.found.state
    failed = [str(proof.get("name")) for proof in run.found.proofs if not proof.get("passed")]
    told = f"; not passed when the run ended: {', '.join(failed)}" if failed else ""
    return judged("run", state == "finished", f"{state} after {run.found.step} steps{told}")


def _data(run: OpenedRun) -> Replay:
    from ftcli.training.manifest import fingerprints

    recorded = run.manifest.get("hashes")
    if not isinstance(recorded, dict) or not recorded:
        return skipped("data", "the manifest has no hashes of tokenizer and sources")
    try:
        found = fingerprints(run.data)
    except FtcliError as error:
        return skipped("data", f"cannot be read again: {_first_line(error)}")
    changed = [name for name, digest in found.items() if recorded.get(name) != digest]
    detail = (
        f"{len(found)} hashes of tokenizer and sources are as they were"
        if not changed
        else "; ".join(_told_apart(name, name in recorded) for name in changed)
    )
    return judged("data", not changed, detail)


def _told_apart(name: str, is_recorded: bool) -> str:
    """What is wrong with one hash of the data."""
    return f"{name} has changed since it was trained on" if is_recorded else f"the manifest has no hash of {name}"


def _order(run: OpenedRun) -> Replay:
    """The chain of batch hashes, computed again from data, seed and mixture."""
    from ftcli.training.batches import digest_of

    recorded = {record["step"]: record.get("batch_hash") for record in run.found.metrics.of_kind("train")}
    try:
        stores, order, objective = (
            run.data.prepared.train,
            run.data.order,
            run.recipe.objective.settled(run.data.prepared.train, run.data.prepared.evaluation, run.data.tokenizer),
        )
    except FtcliError as error:
        return skipped("order of examples", f"the data cannot be read again: {_first_line(error)}")
    if run.recipe.method.reads_features:
        return skipped("order of examples", "what was trained on are features, which would have to be computed again")
    chain = ""
    for step in range(1, max(recorded, default=0) + 1):
        digest = digest_of([objective.pose(stores[source].tree(index)) for source, index in order.examples_at(step)])
        chain = hashlib.sha256((chain + digest).encode()).hexdigest()
        if step in recorded and recorded[step] != chain:
            return judged("order of examples", False, f"the batches up to step {step} are not those that metrics.jsonl has the hash of")
    return judged("order of examples", bool(recorded), f"the hash chain of {max(recorded, default=0)} steps is the same, token for token")


def _base(run: OpenedRun) -> Replay:
    from ftcli.models.fingerprint import is_other_base

    recorded = run.manifest.get("base_fingerprint")
    if not isinstance(recorded, str) or not recorded:
        return skipped("base", "the manifest has no fingerprint of it")
    is_other = is_other_base(run.base_fingerprint, recorded)
    return judged("base", not is_other, "is another model than the run began with" if is_other else "has the fingerprint it had")


def _frozen(run: OpenedRun) -> Replay:
    """Weights that were not to train are those of the base, tensor by tensor."""
    import torch

    from ftcli.methods.context import AttachContext
    from ftcli.training.assemble import attached, load_base
    from ftcli.training.proofs import frozen_tensors
    from ftcli.training.seeds import derive_seed

    name = "frozen weights"
    if run.recipe.method.artefact == "adapter":
        return skipped(name, "an adapter holds none of them: `base` above is the same proof")
    base = load_base(run.recipe, run.recipe.model.load_tokenizer(), run.device)
    module = attached(run.recipe, base, AttachContext(seed=derive_seed(run.recipe.train.seed, "method"), restoring=True))
    frozen = frozen_tensors(module)
    if not frozen:
        return skipped(name, "every weight trains")
    saved = dict(run.module.named_parameters())
    changed = [key for key, value in frozen if key not in saved or not torch.equal(value, saved[key].to(value.dtype))]
    detail = f"{len(frozen)} frozen tensors are the base's, bit for bit" if not changed else f"changed: {', '.join(changed[:5])}"
    return judged(name, not changed, detail)


def _reloaded(run: OpenedRun) -> Replay:
    import torch

    from ftcli.layout.model import TreeModel, inner_model
    from ftcli.training.proofs import probe_log_probs, prove_reloaded

    recorded = torch.tensor(run.probe["log_probs"])
    found = probe_log_probs(TreeModel(run.module), run.trees)
    if found.shape != recorded.shape:
        return judged("saved = trained", False, f"the probe gives {tuple(found.shape)} numbers, and {tuple(recorded.shape)} were written")
    proof = prove_reloaded(recorded, found, inner_model(run.module).dtype)
    return judged("saved = trained", proof.passed, proof.detail)


def _layout(run: OpenedRun) -> Replay:
    """The forest layout gives what rows give, on the trained model."""
    import torch

    from ftcli.layout.build import build_batch
    from ftcli.layout.model import TreeModel, inner_model
    from ftcli.layout.probe import TOLERANCE
    from ftcli.training.proofs import probe_log_probs

    if (run.manifest.get("layout") or {}).get("layout") != "forest":
        return skipped("layout", "the run computed in rows, as the model itself does")
    model = TreeModel(run.module)
    rows = probe_log_probs(model, run.trees)
    model.use_layout("forest")
    weights = [(torch.arange(len(tree)) > 0).float().numpy() for tree in run.trees]
    with torch.inference_mode():
        forest = model(build_batch("forest", run.trees, weights).to(run.device)).float().cpu()
    model.use_layout("rows")
    # The order of targets is each layout's own; sorted, equal sets of values are equal.
    difference = float((forest.flatten().sort().values - rows.flatten().sort().values).abs().max())
    limit = TOLERANCE.get(inner_model(run.module).dtype, 5e-2) * max(1.0, float(rows.abs().max()))
    return judged("layout", difference <= limit, f"forest and rows differ by at most {difference:.1e} nats over {len(rows)} tokens")


def _template(run: OpenedRun) -> Replay:
    from ftcli.training.probe import rendered_conversation

    recorded = run.probe.get("conversation")
    if recorded is None:
        return skipped("template", "the run had none, or it refuses the probe's conversation")
    found = rendered_conversation(run.tokenizer)
    if found == recorded:
        return judged("template", True, f"a conversation gives the {len(recorded['tokens'])} tokens it gave")
    if found is None:
        return judged("template", False, "the tokenizer beside the weights has no template any more, or it refuses the conversation")
    what = "text" if found["text"] != recorded["text"] else "tokens"
    return judged("template", False, f"a conversation is rendered to another {what} than in training")


def _answers(run: OpenedRun) -> list[Replay]:
    """Greedy answers to the probe's prompts: they stop as they did, and on the same kind of device they are the same."""
    from ftcli.models.generate import generate

    asked = run.probe.get("answers") or []
    if not asked:
        return [skipped("generation stops", "the run had no prompts to answer")]
    limit = int(run.probe["max_new_tokens"])
    found = generate(run.module, run.tokenizer, [entry["prompt"] for entry in asked], max_new_tokens=limit)
    stopped = sum(answer.stopped for answer in found)
    before = sum(bool(entry["stopped"]) for entry in asked)
    replays = [judged("generation stops", stopped >= before, f"{stopped} of {len(asked)} answers end within {limit} tokens ({before} did)")]
    device = str(run.manifest.get("environment", {}).get("device", ""))
    if device.partition(":")[0] != run.device.type:
        return [*replays, skipped("answers", f"the run was on {device}, and this is {run.device.type}: near ties may go the other way")]
    other = [index for index, (entry, answer) in enumerate(zip(asked, found, strict=True)) if entry["answer"] != answer.text]
    detail = f"{len(asked)} greedy answers are word for word what they were"
    if other:
        detail = f"{len(other)} of {len(asked)} greedy answers are others, such as {found[other[0]].text[:60]!r}"
    return [*replays, judged("answers", not other, detail)]


def _metrics(run: OpenedRun) -> Replay:
    """The loss of the first rows of every evaluation source."""
    from ftcli.layout.model import TreeModel
    from ftcli.training.probe import measured_losses

    name, recorded = "metrics on the probe rows", run.probe.get("losses") or {}
    if not recorded:
        return skipped(name, "the run had no evaluation source")
    if run.recipe.method.reads_features:
        return skipped(name, "they are measured on features, which would have to be computed again")
    try:
        stores = run.data.prepared.evaluation
        objective = run.recipe.objective.settled(run.data.prepared.train, stores, run.data.tokenizer)
    except FtcliError as error:
        return skipped(name, f"the data cannot be read again: {_first_line(error)}")
    found = measured_losses(TreeModel(run.module), objective, stores, run.data.tokenizer.pad_id or 0)
    moved = {source: abs(found[source] - loss) if source in found else float("inf") for source, loss in recorded.items()}
    worst = max(moved, key=lambda source: moved[source])
    holds = moved[worst] <= LOSS_TOLERANCE * max(1.0, abs(recorded[worst]))
    return judged(name, holds, f"losses of {len(recorded)} sources differ by at most {moved[worst]:.1e} nats per target (`{worst}`)")


def _checkpoints(run: OpenedRun) -> list[Replay]:
    from ftcli.training.checkpoint import Checkpoints, verified_state

    checkpoints, replays = Checkpoints(run.path / "checkpoints", keep=1), []
    for step in checkpoints.steps():
        try:
            verified_state(checkpoints.path(step))
        except FtcliError as error:
            replays.append(Replay(f"checkpoint {step}", "fails", error.summary))
    count = len(checkpoints.steps())
    if replays or not count:
        return replays
    return [Replay("checkpoints", "holds", f"{count} checkpoint{'s have' if count > 1 else ' has'} the bytes that were written")]


REPLAYS: dict[str, Callable[[OpenedRun], Replay | list[Replay]]] = {
    "run": _is_finished,
    "checkpoints": _checkpoints,
    "data": _data,
    "order of examples": _order,
    "base": _base,
    "frozen weights": _frozen,
    "saved = trained": _reloaded,
    "layout": _layout,
    "template": _template,
    "generation stops": _answers,
    "metrics on the probe rows": _metrics,
}
