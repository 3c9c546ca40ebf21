"""How long ftcli takes to start and to say no: medians of wall and CPU time, each in a fresh process.

    python scripts/startup.py [--runs 15]

The aims are `ftcli --help` under 0.3 s and `ftcli check --fast` with an error under 1 s. Whether torch was imported is read from
`python -X importtime`, not guessed from the time. On a machine that does other things the CPU time is the better figure.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate")
RECIPE = """version: 1
name: slow-start
model: {base: "builtin:tiny"}
data:
  train: [{source: {kind: builtin, name: orders}}]
"""


def recipes(folder: Path) -> dict[str, Path]:
    """A recipe that is right, one with a misspelt key, and one whose rows have another column."""
    texts = {
        "right": RECIPE,
        "misspelt key": f"{RECIPE}method: {{kind: lora, rnak: 8}}\n",
        "wrong column": RECIPE.replace("}}]", "}, format: {kind: text, text: body}}]"),
    }
    paths = {}
    for name, text in texts.items():
        paths[name] = folder / f"{name.replace(' ', '-')}.yaml"
        paths[name].write_text(text)
    return paths


def seconds(command: list[str], runs: int) -> tuple[list[float], list[float]]:
    """Wall time and CPU time of each of so many runs."""
    walls, cpus = [], []
    for _ in range(runs):
        wall, cpu = time.perf_counter(), cpu_seconds()
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        walls.append(time.perf_counter() - wall)
        cpus.append(cpu_seconds() - cpu)
    return walls, cpus


def cpu_seconds() -> float:
    """Of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def imported(arguments: list[str]) -> tuple[int, list[str]]:
    """Exit code, and which heavy packages one run imported."""
    command = [sys.executable, "-X", "importtime", "-m", "ftcli.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    return done.returncode, [name for name in HEAVY if name in modules]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    os.environ["PYTHONPATH"] = str(ROOT / "src")
    print(f"{'command':<36} {'exit':>4} {'wall':>8} {'least':>8} {'most':>8} {'CPU':>8}   heavy imports")
    with tempfile.TemporaryDirectory() as folder:
        checks = {f"check --fast ({name})": ["check", "--fast", str(path)] for name, path in recipes(Path(folder)).items()}
        for name, arguments in {"--help": ["--help"], **checks}.items():
            code, heavy = imported(arguments)
            walls, cpus = seconds([sys.executable, "-m", "ftcli.cli.main", *arguments], runs)
            figures = " ".join(f"{value:6.2f} s" for value in (statistics.median(walls), min(walls), max(walls), statistics.median(cpus)))
            print(f"{name:<36} {code:>4} {figures}   {', '.join(heavy) or 'none'}")


if __name__ == "__main__":
    main()
