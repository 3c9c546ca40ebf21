"""The proofs of what `ftcli merge` and `ftcli export` have written, replayed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import FtcliError, Problem, UsageError
from ftcli.reporting.found_run import ARTEFACTS, CHAIN_SUMMARY, is_run, runs_in
from ftcli.reporting.verify.replay import Replay, judged, replay_files, skipped
from ftcli.reporting.verify.run import DAMAGED, _first_line, verify_run

if TYPE_CHECKING:
    from torch import nn

VALUE_TOLERANCE = {"float32": 1e-3, "float64": 1e-3}
"""Nats, of a token's log-probability; of shorter numbers `SHORT_TOLERANCE`."""
SHORT_TOLERANCE = 0.1


def verify(target: Path, device: str = "auto") -> list[Replay]:
    """Every proof of a run (and of what was merged in its folder), of all runs of a chain, of a merge or an export, replayed.

    Raises:
        UsageError: there is no manifest.
    """
    if target.name in ARTEFACTS and is_run(target.parent):
        target = target.parent
    if is_run(target):
        merged = target / "merged"
        found = verify_folder(merged, device) if (merged / "manifest.json").is_file() else []
        return [*verify_run(target, device), *_under("merged", found)]
    if (target / CHAIN_SUMMARY).is_file():
        return [replay for stage in runs_in(target) for replay in _under(stage.name, verify(stage, device))]
    if not (target / "manifest.json").is_file():
        what = "has no manifest.json: there is nothing to hold it against" if target.is_dir() else "does not exist"
        hint = "runs, merges and exports of ftcli have one"
        raise UsageError("it cannot be verified", [Problem("", f"`{target}` {what}", hint)])
    return verify_folder(target, device)


def _under(name: str, replays: list[Replay]) -> list[Replay]:
    """What was asked of a folder of that name in another."""
    return [Replay(f"{name}/ {replay.name}", replay.outcome, replay.detail) for replay in replays]


def verify_folder(folder: Path, device: str) -> list[Replay]:
    """The proofs of a merged or exported model."""
    from ftcli.models.quiet import quiet_libraries

    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        kind = manifest.get("kind")
    except (OSError, ValueError, AttributeError) as error:
        return [Replay("manifest", "fails", f"manifest.json cannot be read: {error}")]
    replays = replay_files(folder, manifest.get("files"), None)
    if kind not in ("merge", "export"):
        return [*replays, skipped("manifest", f"it is of kind `{kind}`, whose proofs ftcli does not know")]
    with quiet_libraries():
        if (folder / "probe.json").is_file():
            replays += _guarded("written = merged", lambda: _values(folder, manifest, device))
            replays += _guarded("merged = attached", lambda: _merge_equality(folder, manifest, device))
        elif (folder / "config.json").is_file() and kind == "merge":
            replays += _guarded("loads and runs", lambda: _runs(folder, device))
            replays.append(skipped("inputs", "the models that were merged are not looked at: `merge_recipe.yaml` makes the merge again"))
        elif kind == "export":
            replays += [
                skipped(str(check.get("name")), f"{'passed' if check.get('passed') else 'not verified'} when it was exported")
                for check in manifest.get("checks", [])
            ]
    return replays


def _guarded(name: str, replay: Any) -> list[Replay]:
    try:
        return [replay()]
    except DAMAGED as error:
        return [Replay(name, "fails", _first_line(error))]


def _loaded(folder: Path, device: str, dtype: str = "auto") -> nn.Module:
    from ftcli.exporting.source import chosen_device
    from ftcli.models.classifier import folder_head
    from ftcli.models.load import load_model
    from ftcli.models.settings import Model
    from ftcli.models.tokenizer import load_tokenizer

    spec = Model(base=str(folder.resolve()))
    return load_model(spec, load_tokenizer(str(folder)), dtype=dtype, device=chosen_device(device), head=folder_head(folder))


def _values(folder: Path, manifest: dict[str, Any], device: str) -> Replay:
    """The files give the log-probabilities that were written down with them."""
    from ftcli.exporting.difference import logits_on
    from ftcli.exporting.kept_probe import kept_values, read_kept_logits

    rows, recorded = read_kept_logits(folder)
    dtype = str(manifest.get("dtype", "auto"))
    module = _loaded(folder, device, dtype)
    found = kept_values(rows, logits_on(module, rows))
    if len(found) != len(recorded):
        return judged("written = merged", False, f"the probe gives {len(found)} numbers, and {len(recorded)} were written")
    moved = max((abs(new - old) for new, old in zip(found, recorded, strict=True)), default=0.0)
    holds = moved <= VALUE_TOLERANCE.get(dtype, SHORT_TOLERANCE)
    return judged("written = merged", holds, f"largest difference {moved:.1e} nats over {len(found)} tokens of the probe")


def _merge_equality(folder: Path, manifest: dict[str, Any], device: str) -> Replay:
    """The merged files against base and adapter, as far apart as they were when they were written, and no farther."""
    from ftcli.exporting.difference import compare, logits_on
    from ftcli.exporting.merge_run import MAX_KL
    from ftcli.exporting.source import open_source

    name, reference = "merged = attached", manifest.get("source")
    if not isinstance(reference, str):
        return skipped(name, "the manifest does not say where the adapter is")
    if reference.startswith("/") and not Path(reference).exists():
        return skipped(name, "the adapter is not where it was")
    try:
        source = open_source(reference, device)
    except FtcliError as error:
        return skipped(name, f"base and adapter cannot be opened: {_first_line(error)}")
    expected = logits_on(source.attached(), source.probe)
    found = compare(expected, logits_on(_loaded(folder, device, str(manifest.get("dtype", "auto"))), source.probe))
    recorded = (manifest.get("written") or {}).get("kl")
    limit = MAX_KL if recorded is None else max(MAX_KL, 1.5 * float(recorded))
    return judged(name, found.kl <= limit, f"{found.line()} (allowed: KL {limit:.1e})")


def _runs(folder: Path, device: str) -> Replay:
    import torch

    from ftcli.exporting.difference import logits_on

    module = _loaded(folder, device)
    rows = min(16, int(module.get_input_embeddings().weight.shape[0]))  # type: ignore[operator]
    is_finite = bool(torch.isfinite(logits_on(module, [list(range(rows))])).all())
    return judged("loads and runs", is_finite, f"logits of {rows} tokens are {'finite' if is_finite else 'NaN or infinite'}")
