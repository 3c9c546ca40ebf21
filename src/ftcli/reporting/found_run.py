"""A run folder as it is found, whatever state it is in: finished, still going, killed, half written, damaged.

Nothing here raises because of what a file holds: what cannot be read is named in `damage` and counts as absent. This is the one
place that knows the files of a run folder and the keys of its manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ftcli.errors import Problem, UsageError, did_you_mean

MANIFEST, METRICS, SAMPLES, LOCK = "manifest.json", "metrics.jsonl", "samples.jsonl", ".lock"
RESOLVED_RECIPE, RECIPE, CHAIN_SUMMARY = "recipe.resolved.yaml", "recipe.yaml", "chain.json"
ARTEFACTS = {"adapter": "adapter_config.json", "model": "config.json"}
"""What a run leaves, and the file that says it is there."""

State = Literal["finished", "running", "killed", "interrupted", "failed", "unknown"]


@dataclass(frozen=True, slots=True)
class Metrics:
    """The records of metrics.jsonl, and the lines that are none."""

    records: list[dict[str, Any]]
    num_bad_lines: int

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record.get("kind") == kind]


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out prompt, what should come, and what came."""

    source: str
    prompt: str
    reference: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class FoundRun:
    """What is known of one run."""

    path: Path
    manifest: dict[str, Any]
    metrics: Metrics
    recipe: dict[str, Any]
    """The resolved recipe; as it was written where there is no resolved one; empty where neither can be read."""
    recipe_text: str
    is_locked: bool
    """Whether a process holds the run's lock at this moment."""
    damage: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.manifest.get("name") or self.recipe.get("name") or self.path.name)

    @property
    def state(self) -> State:
        """How the run stands; a run that says it is running and holds no lock was killed."""
        status = self.manifest.get("status")
        if status == "running" or (status is None and self.is_locked):
            return "running" if self.is_locked else "killed"
        return status if status in ("finished", "interrupted", "failed") else "unknown"

    @property
    def step(self) -> int:
        """The last step that metrics.jsonl knows of."""
        return max((record["step"] for record in self.metrics.records), default=0)

    @property
    def num_steps(self) -> int | None:
        value = self.manifest.get("num_steps", self.manifest.get("steps"))
        return value if isinstance(value, int) else None

    @property
    def method(self) -> str:
        """The method in a few words, as `lora rank 16`."""
        method = _mapping(self.recipe.get("method"))
        rank = method.get("rank")
        return str(method.get("kind", "-")) + (f" rank {rank}" if isinstance(rank, int) else "")

    @property
    def base(self) -> str:
        """The base model by its name, without the folders of this machine."""
        model = _mapping(self.recipe.get("model"))
        if isinstance(base := model.get("base"), str):
            return base_name(base)
        architecture = _mapping(model.get("init")).get("architecture")
        return f"{architecture} from random weights" if architecture else "-"

    @property
    def artefact(self) -> str | None:
        """`adapter` or `model`, whichever the run has left."""
        return next((kind for kind in ARTEFACTS if has_artefact(self.path, kind)), None)

    @property
    def last_loss(self) -> float | None:
        return next((record["loss"] for record in reversed(self.metrics.of_kind("train")) if _is_number(record.get("loss"))), None)

    @property
    def before(self) -> dict[str, dict[str, Any]]:
        """The evaluation before training: of step 0, or empty."""
        return next((dict(record["sources"]) for record in self.metrics.of_kind("evaluate") if record["step"] == 0), {})

    @property
    def after(self) -> dict[str, dict[str, Any]]:
        """The last evaluation after a step, or empty."""
        return next((dict(record["sources"]) for record in reversed(self.metrics.of_kind("evaluate")) if record["step"] > 0), {})

    @property
    def proofs(self) -> list[dict[str, Any]]:
        return _records(self.manifest.get("proofs"))

    @property
    def data(self) -> list[dict[str, Any]]:
        """One data report per source, the training sources first; `use` says what for."""
        sources = _mapping(self.recipe.get("data")).get("train")
        num_train = len(sources) if isinstance(sources, list) else 0
        reports = _records(self.manifest.get("data"))
        return [{**report, "use": "train" if index < num_train else "evaluation"} for index, report in enumerate(reports)]

    @property
    def seconds(self) -> float | None:
        value = self.manifest.get("seconds")
        return value if isinstance(value, int | float) else None

    @property
    def samples(self) -> list[Sample]:
        """Generated answers before and after training; of each prompt the first and the last answer."""
        found: dict[tuple[str, str], Sample] = {}
        for record in _read_lines(self.path / SAMPLES).records:
            source, prompt, answer = str(record.get("source", "")), str(record.get("prompt", "")), str(record.get("answer", ""))
            sample = found.setdefault((source, prompt), Sample(source, prompt, str(record.get("reference", "")), None, None))
            found[source, prompt] = replace(sample, before=answer) if record["step"] == 0 else replace(sample, after=answer)
        return list(found.values())

    @property
    def environment(self) -> dict[str, Any]:
        """Device, processes, precision, Python, platform, and `versions`."""
        return _mapping(self.manifest.get("environment"))

    @property
    def versions(self) -> dict[str, str]:
        """Version of each package that was installed."""
        return {name: str(version) for name, version in _mapping(self.environment.get("versions")).items() if version is not None}

    @property
    def changed(self) -> float | None:
        """When the run last wrote about itself, in seconds since the epoch."""
        times = [_modified(self.path / name) for name in (MANIFEST, METRICS, RESOLVED_RECIPE)]
        return max((time for time in times if time is not None), default=None)


def read_run(path: Path) -> FoundRun:
    """What the folder `path` tells, however little."""
    damage: list[str] = []
    manifest = _read_json(path / MANIFEST, damage)
    metrics = read_metrics(path / METRICS)
    if metrics.num_bad_lines:
        damage.append(f"{METRICS}: {metrics.num_bad_lines} lines are no JSON objects")
    recipe, text = _read_recipe(path, damage)
    return FoundRun(path, manifest, metrics, recipe, text, _is_locked(path / LOCK), tuple(damage))


def read_metrics(file: Path) -> Metrics:
    """The records of a metrics.jsonl; a missing file has none, and a last line that is still being written is no bad line."""
    metrics = _read_lines(file)
    return Metrics([_in_shape(record) for record in metrics.records], metrics.num_bad_lines)


def _in_shape(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with `sources` that are what its kind has: losses by name, or measures by name."""
    kinds: tuple[type, ...] = (dict,) if record.get("kind") == "evaluate" else (int, float)
    return {**record, "sources": {name: value for name, value in _mapping(record.get("sources")).items() if isinstance(value, kinds)}}


def _read_lines(file: Path) -> Metrics:
    """The JSON objects in a file that have a whole number as `step`."""
    lines = _read_text(file).split("\n")
    records, num_bad = [], 0
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif line.strip() and number < len(lines):
            num_bad += 1
    return Metrics(records, num_bad)


def has_artefact(run: Path, kind: str) -> bool:
    """Whether the run has left an artefact of this kind; an ensemble is a folder of adapters."""
    return (run / kind / ARTEFACTS[kind]).is_file() or (run / kind / "member-0" / ARTEFACTS[kind]).is_file()


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, in whatever state."""
    # A merged model or an exported adapter has a manifest, too, and its configuration beside it; other exports say what they are.
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return False
    if any((path / name).is_file() for name in (METRICS, RESOLVED_RECIPE)):
        return True
    return (path / MANIFEST).is_file() and _read_json(path / MANIFEST, []).get("kind") != "export"


def runs_in(folder: Path) -> list[Path]:
    """The runs in a folder, one or more levels down, by name; a folder that is a run itself is the only one."""
    return sorted(_walk(folder, depth=3))


def find_run(target: str, folder: Path) -> Path:
    """The run that a user means by a path, or by a name in `folder`.

    Raises:
        UsageError: there is none.
    """
    for path in (Path(target), folder / target):
        if is_run(path):
            return path
    names = [str(path.relative_to(folder)) for path in runs_in(folder)] if folder.is_dir() else []
    stages = [path for path in (Path(target), folder / target) if (path / CHAIN_SUMMARY).is_file()]
    if stages:
        runs = runs_in(stages[0])
        way_out = f"name stages of it: {', '.join(f'`{run}`' for run in runs)}; {stages[0] / 'report.html'} is over all of them"
        raise UsageError("there is no such run", [Problem("", f"`{target}` is a chain of {len(runs)} runs", way_out)])
    what = "is no run folder" if Path(target).exists() else "does not exist"
    hint = did_you_mean(target, names) or (f"runs in `{folder}`: {', '.join(names[:10])}" if names else None)
    raise UsageError("there is no such run", [Problem("", f"`{target}` {what}", hint)])


def base_name(reference: str) -> str:
    """A model reference without the folders of this machine.

    Example:
        >>> base_name("builtin:tiny"), base_name("/data/models/llama"), base_name("org/model")
        ('builtin:tiny', 'llama', 'org/model')
    """
    return Path(reference).name if reference.startswith(("/", ".", "~")) or reference.count("/") > 1 else reference


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
    elif depth and folder.is_dir():
        for child in folder.iterdir():
            if child.is_dir() and not child.name.startswith("."):
                yield from _walk(child, depth - 1)


def _modified(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_json(file: Path, damage: list[str]) -> dict[str, Any]:
    text = _read_text(file)
    value = _parse(text)
    if isinstance(value, dict):
        return value
    damage.append(f"{file.name}: {'no JSON object' if text else 'missing'}")
    return {}


def _read_recipe(path: Path, damage: list[str]) -> tuple[dict[str, Any], str]:
    import yaml

    for name in (RESOLVED_RECIPE, RECIPE):
        text = _read_text(path / name)
        if not text:
            continue
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError):
            value = None
        if isinstance(value, dict):
            return value, text
        damage.append(f"{name}: no YAML mapping")
    return {}, ""


def _is_locked(file: Path) -> bool:
    """Whether a living process holds the lock: the kernel lets go of it when the process ends, however it ends."""
    import fcntl

    try:
        with file.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _records(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
