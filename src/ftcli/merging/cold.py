"""ColD fusion: rounds of "everyone fine-tunes from here, average, repeat", with a folder as the meeting place.

```
FOLDER/cold.json                                       the base, and what has been fused of what
FOLDER/rounds/000/model/                               where everyone starts
FOLDER/rounds/000/contributions/NAME/model/            what one contributor made of it
FOLDER/rounds/000/contributions/NAME/contribution.json
FOLDER/rounds/001/model/                               their average, and the next start
```

Contributors may be different machines that share nothing but the folder: what is still being written has a name that nobody reads,
and a contribution or a model appears by one renaming. Source: Don-Yehiya et al. 2022, arXiv:2212.01378.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import GateError, Problem, RecipeError, RequestError, RunError, UsageError
from ftcli.files import PARTIAL, new_folder, said_when_disk_is_full, sha256_of, sync_folder, write_json
from ftcli.merging.documents import read_object
from ftcli.merging.engine import JOURNAL, Say, working_folder
from ftcli.merging.meeting import Contribution, Meeting, Round
from ftcli.merging.numbers import DTYPES
from ftcli.merging.outcome import copy_tokenizer
from ftcli.merging.search.written import linear_document, planned
from ftcli.merging.stored import StoredTensor, folder_tensors, not_finite
from ftcli.models.locate import model_folder

if TYPE_CHECKING:
    from ftcli.reporting.live import Reporter

FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_AROUND = ("config.json", "generation_config.json", "*.py")


def begin(folder: Path, base: str) -> Meeting:
    """A new meeting place whose first round starts from `base`.

    Raises:
        RequestError: there is no such model, or something is in the folder already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"`{folder}` exists already", hint="choose another folder, or go on in it with `ftcli cold contribute`")
    source = model_folder(base)
    _check_model(source, base)
    with new_folder(folder) as partial:
        meeting = Meeting(partial)
        place = meeting.round_at(0).model
        place.mkdir(parents=True)
        copy_model(source, place)
        write_json(partial / "cold.json", {"version": FORMAT, "base": base, "rounds": []})
    return Meeting(folder)


def copy_model(source: Path, target: Path) -> None:
    """Copy weights, configuration and tokenizer of a model folder."""
    with said_when_disk_is_full(target):
        for pattern in (*_AROUND, "*.safetensors", "*.safetensors.index.json"):
            for path in source.glob(pattern):
                shutil.copyfile(path, target / path.name)
        copy_tokenizer(source, target)


def contribute(
    meeting: Meeting, recipe: Path, reporter: Reporter, *, name: str | None = None, overrides: Sequence[str] = (), work: Path | None = None
) -> dict[str, Any]:
    """Train as a recipe says from the current round's model, and put the result into the round. Run again after a kill, it goes on.

    Args:
        name: of the contribution; the default is the recipe's.
        work: where the training run is kept; the default is runs/cold-... in the current folder.

    Raises:
        RequestError: the recipe is wrong, or the round has a contribution of this name.
        RunError: the training failed, or the round was fused while it went on.
    """
    from ftcli.recipe.load import load_recipe
    from ftcli.training.run import run_folder, run_recipe

    now = meeting.current
    known = _free_name(now, name or str(load_recipe(recipe, overrides).recipe.name))
    place = (work or Path.cwd() / "runs").resolve() / f"cold-{meeting.folder.resolve().name}-{now.number:03d}-{known}"
    settled = [*overrides, f"model.base={json.dumps(str(now.model.resolve()))}", f"output={json.dumps(str(place))}"]
    loaded = load_recipe(recipe, settled)
    reporter.note(f"round {now.number} of {meeting.folder}: contributing as `{known}`")
    summary = run_recipe(loaded, reporter, resume=True)
    model = _dense(run_folder(loaded.recipe).path, loaded.recipe.method.artefact, reporter)
    facts = {"recipe": loaded.recipe.name, "steps": summary.get("steps"), "method": loaded.recipe.method.kind}
    return put(meeting, now, known, model, facts)


def _dense(run: Path, artefact: str, reporter: Reporter) -> Path:
    """The run's result as a whole model: only these can be averaged with those of other methods."""
    if artefact == "model":
        return run / "model"
    from ftcli.exporting.merge_run import merge_run

    if not (run / "merged" / "config.json").is_file():
        merge_run(run, run / "merged", dtype="float32", progress=reporter)
    return run / "merged"


def put(meeting: Meeting, now: Round, name: str, model: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Put a whole model into a round, in one move.

    Raises:
        RequestError: it does not fit the round's model, or the name is taken.
        RunError: the round has been fused already.
    """
    _free_name(now, name)
    models = [str(now.model.resolve()), str(model.resolve())]
    with _said_of(f"`{model}` cannot be contributed to round {now.number}"):
        planned(linear_document(models, [0.5, 0.5]), meeting.folder / "cold.yaml", None, None, 1)
    _check_model(model, str(model))
    if meeting.current.number != now.number:
        hint = f"contribute again: it will start from round {meeting.current.number}"
        raise RunError(f"round {now.number} was fused while this was made: it has not been put there", hint=hint)
    folder = now.folder / "contributions"
    folder.mkdir(exist_ok=True)
    # a name of its own for every attempt: two machines may try at once
    partial = folder / f"{PARTIAL}{name}-{uuid.uuid4().hex}"
    try:
        (partial / "model").mkdir(parents=True)
        copy_model(model, partial / "model")
        hashes = {path.name: sha256_of(path) for path in sorted((partial / "model").glob("*.safetensors"))}
        note = {"name": name, "round": now.number, "host": socket.gethostname(), "sha256": hashes, **facts}
        write_json(partial / "contribution.json", note)
        sync_folder(partial)
        _claim(partial, folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {**note, "folder": str(folder / name)}


def _check_model(folder: Path, name: str) -> None:
    """Refuse what is no model folder, and a model whose numbers are not finite: no mean with it would be.

    Raises:
        RequestError: it is one.
    """
    if not (folder / "config.json").is_file():
        raise RequestError("the model cannot be read", [Problem(name, "it has no config.json", "a model folder; of a run, its `model`")])
    read_object(folder / "config.json", name)
    if broken := not_finite(folder_tensors(folder)):
        listed = ", ".join(f"`{tensor}`" for tensor in broken[:3]) + (f" ... and {len(broken) - 3} more" if len(broken) > 3 else "")
        raise RequestError("the model is not finite", [Problem(name, f"NaN or infinite numbers in {listed}")])


@contextmanager
def _said_of(summary: str) -> Iterator[None]:
    """Say what is wrong with a plan as what it is, not as a problem of a recipe that nobody wrote.

    Raises:
        RequestError: models do not fit each other.
    """
    try:
        yield
    except RecipeError as error:
        problems = [Problem("" if "(line " in each.where else each.where, each.what, each.hint) for each in error.problems]
        raise RequestError(summary, problems) from None


def remove(meeting: Meeting, name: str) -> Path:
    """Take a contribution out of the current round; its folder.

    Raises:
        UsageError: the round has none of this name.
    """
    now = meeting.current
    folder = now.folder / "contributions" / name
    if not _NAME.fullmatch(name) or not folder.is_dir():
        names = sorted(path.name for path in (now.folder / "contributions").glob("*") if not path.name.startswith(PARTIAL))
        raise UsageError(f"round {now.number} has no contribution `{name}`", hint=f"contributions: {', '.join(names) or 'none'}")
    aside = folder.with_name(f"{PARTIAL}{name}-{uuid.uuid4().hex}")
    folder.rename(aside)
    shutil.rmtree(aside)
    return folder


def _claim(partial: Path, path: Path) -> None:
    """Rename, but never onto another contribution.

    Raises:
        UsageError: somebody was faster.
    """
    try:
        partial.rename(path)
    except OSError as error:
        if not path.exists():
            raise
        raise UsageError(f"the round has a contribution `{path.name}` already", hint="choose another --name") from error


def _free_name(now: Round, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(f"--name: found `{name}`, allowed: letters of a to z, digits, dots, dashes and underscores")
    if (now.folder / "contributions" / name).exists():
        hint = f"wait for `ftcli cold fuse {now.folder.parent.parent}`, or contribute under another --name"
        raise UsageError(f"round {now.number} has a contribution `{name}` already", hint=hint)
    return name


def fuse(
    meeting: Meeting,
    *,
    expect: int | None = None,
    prune: bool = False,
    threads: int | None = None,
    verify: bool = True,
    say: Say | None = None,
) -> dict[str, Any]:
    """Average the current round's contributions, each counting the same, into the model of the next round.

    Args:
        expect: so many must be there; None takes all there are.
        prune: remove the weights of the contributions afterwards.

    Raises:
        GateError: fewer contributions than expected are there.
        RequestError: a contribution is damaged.
    """
    meeting.rounds()
    with meeting.only_fuser():
        now = meeting.current
        found = now.contributions()
        if len(found) < (expect or 1):
            names = ", ".join(each.name for each in found) or "none"
            what = f"{len(found)} of {expect or 1} contributions are there: {names}"
            raise GateError(f"round {now.number} is not complete", [Problem("", what, "ftcli cold contribute")])
        _check_whole(found)
        following = meeting.round_at(now.number + 1)
        following.folder.mkdir(parents=True, exist_ok=True)
        _average(now, found, following.model, threads, verify, say)
        entry = {"round": now.number, "contributions": [each.note for each in found]}
        info = meeting.info()
        write_json(meeting.folder / "cold.json", {**info, "rounds": [*info["rounds"], entry]})
        _tidy(now, found if prune else [])
    return {"round": following.number, "model": str(following.model), "contributions": [each.name for each in found]}


def _average(now: Round, found: Sequence[Contribution], output: Path, threads: int | None, verify: bool, say: Say | None) -> None:
    """Their mean, by the merge engine; a fuse that was killed goes on where it was.

    The mean is the round's model plus the mean of the changes: what nobody changes keeps its bits.
    """
    from ftcli.merging.outcome import carry_out_plan

    number = threads or len(os.sched_getaffinity(0))
    models = [str(each.model.resolve()) for each in found]
    share = {"weight": 1 / len(models)}
    document = {
        "merge_method": "task_arithmetic",
        "base_model": str(now.model.resolve()),
        "models": [{"model": model, "parameters": share} for model in models],
    }
    if len(models) == 1:
        document = linear_document(models, [1.0])
    with _said_of("the contributions cannot be averaged"):
        plan = planned(document, output.parent / "cold.yaml", output, _dtype(now, found), number)
    folder = working_folder(output)
    goes_on = (folder / JOURNAL).is_file() and plan.fingerprint() in (folder / JOURNAL).read_text(encoding="utf-8").partition("\n")[0]
    if not goes_on:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        carry_out_plan(plan, output, threads=number, resume=goes_on, verify=verify, say=say)
    except GateError as error:
        hint = "`ftcli cold remove FOLDER NAME` takes a contribution out of the round"
        raise GateError(error.summary, error.problems, hint=hint) from error


def _dtype(now: Round, found: Sequence[Contribution]) -> str | None:
    """torch's name of the dtype that most weights of the first contribution have; None keeps each tensor's own.

    They are kept where all contributions have those of the round's model, and of one contribution by itself.
    """
    tensors = [folder_tensors(each.model) for each in found]
    own = _dtypes(folder_tensors(now.model))
    if len(found) == 1 or all(_dtypes(each) == own for each in tensors):
        return None
    sizes: Counter[str] = Counter()
    for tensor in tensors[0].values():
        sizes[tensor.dtype] += tensor.size
    names = {code: name for name, code in DTYPES.items()}
    return names.get(sizes.most_common(1)[0][0], "float32")


def _dtypes(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    return {name: tensor.dtype for name, tensor in tensors.items()}


def _check_whole(found: Sequence[Contribution]) -> None:
    problems = []
    for each in found:
        hashes = each.note.get("sha256")
        for name, expected in (hashes if isinstance(hashes, dict) else {"contribution.json": ""}).items():
            path = each.model / name
            if not path.is_file() or sha256_of(path) != expected:
                hint = f"`ftcli cold remove FOLDER {each.name}`, and contribute again"
                problems.append(Problem(each.name, f"`{name}` is not what was contributed", hint))
    if problems:
        raise RequestError("a contribution is damaged", problems)


def _tidy(now: Round, pruned: Sequence[Contribution]) -> None:
    """Remove what was left half-written in a round that is over, and the weights that are not kept."""
    for path in (now.folder / "contributions").glob(f"{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)
    for each in pruned:
        shutil.rmtree(each.model)


def status(meeting: Meeting) -> dict[str, Any]:
    """Every round with its contributions."""
    current = meeting.current.number
    rounds: list[dict[str, Any]] = []
    for each in meeting.rounds():
        notes = [{"name": found.name, **found.note} for found in each.contributions()]
        rounds.append({"round": each.number, "model": str(each.model), "contributions": notes})
    return {"folder": str(meeting.folder), "base": meeting.info()["base"], "current": current, "rounds": rounds}


def status_lines(report: dict[str, Any]) -> list[str]:
    """The status for people."""
    lines = [f"{report['folder']}: from {report['base']}, now in round {report['current']}"]
    for each in report["rounds"]:
        names = ", ".join(note["name"] for note in each["contributions"]) or "no contributions yet"
        lines.append(f"round {each['round']}: {names}")
    return lines
