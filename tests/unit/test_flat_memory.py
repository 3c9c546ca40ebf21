"""A long evaluation takes no more memory than a short one: rows are read, scored and written part by part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# What a model would say is made up: memory of a forward pass is that of a batch, whatever the number of rows.
WORKER = """
import json, resource, sys
from pydantic import TypeAdapter
from ftcli.evaluation import rows
rows.ROWS_AT_ONCE = int(sys.argv[2])
from ftcli.evaluation.choices import Likelihood, Scored
from ftcli.evaluation.tasks import Task, multiple_choice, preference, task

def score_continuations(model, tokenizer, asked, **options):
    found = [[Likelihood(-float(len(choice) + place % 7), 1) for choice in row.choices] for place, row in enumerate(asked)]
    return Scored(found, len(asked), len(asked), 0)

multiple_choice.score_continuations = preference.score_continuations = score_continuations
made = TypeAdapter(Task).validate_python(json.loads(sys.argv[1]), strict=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = made.measure(task.Subject(None, None, 4096, lambda done, total: None))
print(json.dumps([len(result.rows), result.rows[-1]["where"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


def grown_kib(folder: Path, kind: str, count: int, part: int) -> int:
    """Memory that `count` rows of 3 kB take beyond what was there before the first."""
    path = folder / f"{count}.jsonl"
    with path.open("w") as file:
        for place in range(count):
            row = {"question": f"{place} " * 300, "prompt": "x" * 1500, "choices": ["a", "bb"], "answer": place % 2}
            file.write(json.dumps({**row, "chosen": "a", "rejected": "bb"}) + "\n")
    document = {"name": "t", "kind": kind, "source": {"kind": "file", "path": str(path)}}
    done = subprocess.run([sys.executable, "-c", WORKER, json.dumps(document), str(part)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    num_rows, last, kib = json.loads(done.stdout)
    assert (num_rows, last) == (count, f"{count}.jsonl:{count}")
    return int(kib)


@pytest.mark.parametrize("kind", ["multiple-choice", "preference"])
def test_six_thousand_rows_take_what_a_thousand_take(kind: str, tmp_path: Path) -> None:
    few, many = grown_kib(tmp_path, kind, 1000, 250), grown_kib(tmp_path, kind, 6000, 250)
    assert many - few < 6 * 1024  # 5,000 rows more hold 15 MB of text; the resamples of the interval take a little


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_what_ten_thousand_take(tmp_path: Path) -> None:
    few, many = grown_kib(tmp_path, "multiple-choice", 10_000, 4096), grown_kib(tmp_path, "multiple-choice", 100_000, 4096)
    assert many - few < 24 * 1024  # 90,000 rows more hold 270 MB; their figures are 5 numbers each
