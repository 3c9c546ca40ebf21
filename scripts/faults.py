"""What a run survives: kill -9 at chosen and at random moments, a full disk, SIGTERM and Ctrl-C.

    python scripts/faults.py [--kills 20] [--seed 11] [--only kill|disk|signal]

Every run that was disturbed goes on with the same command and --resume, and has to end with the weights and metrics of one that
was not, bit for bit. After every disturbance every folder that has a checkpoint's name has to be a whole checkpoint. The full
disk is a small tmpfs, which only root can mount; without it that part is skipped. Prints a table; exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_dropout": 0.1,
}
STEPS, SAVE_EVERY, NUM_ROWS = 30, 3, 20_000
AT_ITS_END = "already at its end"
TIMEOUT_SECONDS = 1800
TMPFS_BYTES = 400 * 2**20


@dataclass
class Place:
    """A run of its own: recipe, run folder, cache."""

    folder: Path
    name: str
    output: Path
    cache: Path

    @property
    def recipe(self) -> Path:
        return self.folder / f"{self.name}.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def write_recipe(self) -> None:
        """Two sources in a mixture, dropout, evaluations: whatever could be replayed or skipped."""
        document = {
            "version": 1,
            "name": self.name,
            "model": {"init": {"architecture": "llama", "config": LLAMA}, "tokenizer": "builtin:tiny"},
            "data": {
                "train": [
                    {"source": {"kind": "file", "path": str(self.folder / "rows.jsonl")}, "weight": 0.5},
                    {"source": {"kind": "builtin", "name": "orders"}, "limit": 25, "weight": 0.5},
                ],
                "evaluation": [{"source": {"kind": "builtin", "name": "stories", "split": "test"}, "limit": 8}],
                "mixture": {"kind": "shares"},
                "max_length": 256,
                "on_overflow": "drop",
                "workers": 2,
            },
            "method": {"kind": "full"},
            "train": {"steps": STEPS, "global_batch_size": 4, "lr": 1e-3, "micro_batch_tokens": 400},
            "every": {"log": 2, "evaluate": 7, "save": SAVE_EVERY},
            "output": str(self.output),
        }
        self.recipe.write_text(json.dumps(document, indent=1))

    def start(self) -> subprocess.Popen[str]:
        """`ftcli train --resume`, which begins where nothing is there yet."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT / "src"),
            "FTCLI_CACHE": str(self.cache),
        }
        command = [sys.executable, "-m", "ftcli.cli.main", "train", str(self.recipe), "--resume"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self) -> tuple[int, str]:
        """Exit code and words of a run that nobody disturbs."""
        child = self.start()
        words, _ = child.communicate(timeout=TIMEOUT_SECONDS)
        return child.returncode, words

    def stage(self) -> str:
        """What the run is doing, from what lies in its folders."""
        if any((self.cache / "trees").glob("*.partial")):
            return "tokenising"
        if any(self.checkpoints.glob(".partial-step-*")):
            return "writing a checkpoint"
        if (self.output / ".partial-model").exists():
            return "writing the result"
        if (self.output / "model").exists():
            return "proving the result"
        if (self.output / "metrics.jsonl").exists():
            return "training"
        if self.output.exists():
            return "beginning"
        return "before the run folder is there"

    def broken_checkpoints(self) -> list[str]:
        """Folders with a checkpoint's name that are no whole checkpoint."""
        from ftcli.errors import RunError
        from ftcli.training.checkpoint import verified_state

        broken = []
        for path in self.checkpoints.glob("step-*"):
            try:
                verified_state(path)
            except RunError as error:
                broken.append(str(error))
        return broken

    def outcome(self) -> tuple[bytes, list[dict[str, Any]]]:
        """The weights' bytes, and the metrics without their times."""
        times = {"seconds", "target_tokens_per_second", "memory_bytes"}
        records = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        weights = (self.output / "model" / "model.safetensors").read_bytes()
        return weights, [{key: value for key, value in record.items() if key not in times} for record in records]


@dataclass
class Report:
    """The table, and whether all went well."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    failed: bool = False

    def add(self, disturbance: str, moment: str, ended: str, good: bool) -> None:
        self.rows.append((disturbance, moment, ended if good else f"**wrong**: {ended}"))
        self.failed |= not good
        print(f"{disturbance} | {moment} | {self.rows[-1][2]}", file=sys.stderr, flush=True)

    def print(self) -> None:
        print("| disturbance | moment | end |\n|---|---|---|")
        for row in self.rows:
            print(f"| {' | '.join(row)} |")


@dataclass(frozen=True)
class Bench:
    """Where everything happens, and what an undisturbed run gives."""

    folder: Path
    expected: tuple[bytes, list[dict[str, Any]]]
    seconds: float
    """Of the undisturbed run."""

    def place(self, name: str, output: Path | None = None, cache: Path | None = None) -> Place:
        place = Place(self.folder, name, output or self.folder / "runs" / name, cache or self.folder / f"cache-{name}")
        place.write_recipe()
        return place

    def verdict(self, place: Place) -> tuple[str, bool]:
        """Let the run end, and compare."""
        code, words = place.finish()
        if code != 0:
            return f"resume ends with exit code {code}: {last_lines(words)}", False
        weights, records = place.outcome()
        if weights != self.expected[0]:
            return "resumed, other weights", False
        if records != self.expected[1]:
            return "resumed, the same weights and other metrics", False
        return "resumed, bitwise equal", True


def last_lines(words: str) -> str:
    return " / ".join(line.strip() for line in words.strip().splitlines()[-4:])


def make_bench(folder: Path) -> Bench:
    """Rows that take seconds to tokenise, and the undisturbed run."""
    generator = random.Random(3)
    syllables = [first + second for first in "bdfgklmnprst" for second in "aeiou"]
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(NUM_ROWS):
            file.write(json.dumps({"text": "".join(generator.choices([*syllables, " "], k=60))}) + "\n")
    whole = Place(folder, "run", folder / "runs" / "undisturbed", folder / "cache-undisturbed")
    whole.write_recipe()
    began = time.monotonic()
    code, said = whole.finish()
    if code != 0:
        raise SystemExit(f"the undisturbed run fails:\n{said}")
    return Bench(folder, whole.outcome(), time.monotonic() - began)


# Each moment: how to know that it is there, and how long after it, in seconds, the kill may come.
Moment = tuple[str, float]
MOMENTS: tuple[Moment, ...] = (
    ("tokenising", 1.5),
    ("training", 1.0),
    ("writing a checkpoint", 0.03),
    ("any", 0.0),
    ("writing the result", 0.05),
)


def kill(place: Place, moment: Moment, seconds: float, generator: random.Random) -> str:
    """Start the run, kill it at the moment, and say what it was doing."""
    name, delay = moment
    child = place.start()
    deadline = time.monotonic() + (generator.uniform(0, 0.7 * seconds) if name == "any" else TIMEOUT_SECONDS)
    while child.poll() is None and time.monotonic() < deadline and (name == "any" or place.stage() != name):
        time.sleep(0.001)
    if name != "any":
        time.sleep(generator.uniform(0, delay))
    stage = place.stage()
    child.kill()
    words, _ = child.communicate()
    if child.returncode == -signal.SIGKILL:
        return stage
    return AT_ITS_END if child.returncode == 0 else f"it had failed: {last_lines(words)}"


def test_kills(bench: Bench, report: Report, count: int, generator: random.Random) -> None:
    """Runs that are killed several times each, every time at another moment; a kill that comes after the end does not count."""
    killed = run = 0
    while killed < count:
        place = bench.place(f"killed-{run}")
        run += 1
        stages: list[str] = []
        for moment in MOMENTS[: count - killed]:
            stage = kill(place, moment, bench.seconds, generator)
            if stage == AT_ITS_END:
                break
            stages.append(stage)
            broken = place.broken_checkpoints()
            if broken or stage.startswith("it had failed"):
                report.add("kill -9", stage, "; ".join(broken), False)
        killed += len(stages)
        ended, good = bench.verdict(place)
        report.add(f"kill -9, {len(stages)} times", ", ".join(stages), ended, good)


def test_signals(bench: Bench, report: Report) -> None:
    """Exit code 75 and a checkpoint to go on from."""
    for number in (signal.SIGTERM, signal.SIGINT):
        for moment in ("tokenising", "training"):
            place = bench.place(f"{number.name.lower()}-{moment}")
            child = place.start()
            wait_for(lambda place=place, moment=moment: place.stage() == moment, child)
            child.send_signal(number)
            words, _ = child.communicate(timeout=TIMEOUT_SECONDS)
            saved = sorted(path.name for path in place.checkpoints.glob("step-*"))
            good = child.returncode == 75 and not place.broken_checkpoints() and (moment == "tokenising" or bool(saved))
            said = next((line for line in words.splitlines() if line.startswith("error:")), last_lines(words))
            ended, equal = bench.verdict(place) if good else ("", False)
            report.add(number.name, moment, f"exit code {child.returncode}, `{said}`; {ended}", good and equal)


def wait_for(condition: Callable[[], bool], child: subprocess.Popen[str]) -> None:
    """Until the condition holds or the child is gone."""
    while child.poll() is None and not condition():
        time.sleep(0.002)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own with little room.

    Raises:
        PermissionError: this user may not mount.
    """
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PermissionError(done.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """A file that takes all room but `leave` bytes."""
    filler = disk / "filler"
    size = shutil.disk_usage(disk).free - leave
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, size))
    return filler


def test_full_disk(bench: Bench, report: Report) -> None:
    """The run folder's disk fills up after the first checkpoint, with room for a part of the next, for none of it, for no byte."""
    parts = {"half a checkpoint fits": 0.5, "nearly a whole one": 0.97, "not a byte": 0.0}
    for name, share in parts.items():
        with small_disk(bench.folder / f"disk-{name.replace(' ', '-')}") as disk:
            place = bench.place(f"full-{name.replace(' ', '-')}", output=disk / "run", cache=bench.folder / "cache-undisturbed")
            child = place.start()
            wait_for(lambda place=place: any(place.checkpoints.glob("step-*")), child)
            first = next(place.checkpoints.glob("step-*"))
            filler = fill(disk, int(share * sum(path.stat().st_size for path in first.iterdir())))
            add_disk_row(bench, report, place, child, filler, f"run folder, {name}")
    with small_disk(bench.folder / "disk-cache") as disk:
        filler = fill(disk, 2**20)
        place = bench.place("full-cache", cache=disk / "cache")
        add_disk_row(bench, report, place, place.start(), filler, "cache, while tokenising")


def add_disk_row(bench: Bench, report: Report, place: Place, child: subprocess.Popen[str], filler: Path, moment: str) -> None:
    """Wait for the run to fail, look at what is left, free the space, and go on."""
    words, _ = child.communicate(timeout=TIMEOUT_SECONDS)
    said = next((line for line in words.splitlines() if line.startswith("error:")), last_lines(words))
    good = child.returncode == 1 and "disk is full" in said and "Traceback" not in words and not place.broken_checkpoints()
    filler.unlink()
    ended, equal = bench.verdict(place) if good else (last_lines(words), False)
    report.add("full disk", moment, f"exit code {child.returncode}, `{said}`; {ended}", good and equal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--only", choices=("kill", "disk", "signal"))
    options = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as name:
        bench = make_bench(Path(name))
        print(f"the undisturbed run takes {bench.seconds:.0f} s", file=sys.stderr, flush=True)
        if options.only in (None, "kill"):
            test_kills(bench, report, options.kills, random.Random(options.seed))
        if options.only in (None, "signal"):
            test_signals(bench, report)
        if options.only in (None, "disk"):
            try:
                test_full_disk(bench, report)
            except PermissionError as error:
                report.rows.append(("full disk", "-", f"skipped: {error}"))
    report.print()
    sys.exit(report.failed)


if __name__ == "__main__":
    main()
