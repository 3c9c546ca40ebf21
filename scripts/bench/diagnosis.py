"""Runs made to be sick in a known way, and healthy ones: does the diagnosis name each sickness, and leave the healthy alone?

    python scripts/bench/diagnosis.py [--folder FOLDER] [--only NAME ...]

Every run is a few seconds on one core of a CPU. Prints for each sick run what was found first and what else, for each healthy one
what was found at all, and the confusion table.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ftcli.builtin.catalogue import dataset_path
from ftcli.cli.main import run as ftcli
from ftcli.reporting.diagnosis.diagnose import RULES, diagnose
from ftcli.reporting.found_run import read_run

ROOT = Path(__file__).parents[2]
Recipe = dict[str, Any]
STORIES = {"source": {"kind": "builtin", "name": "stories"}, "format": {"kind": "text"}}


def rows_of(name: str, split: str, count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows of a built-in data set."""
    with gzip.open(dataset_path(name, split), "rt", encoding="utf-8") as file:
        return [json.loads(line) for index, line in enumerate(file) if first <= index < first + count]


def file_of(folder: Path, name: str, rows: list[dict[str, Any]]) -> Recipe:
    """A source that reads these rows."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"kind": "file", "path": str(path)}


def orders(count: int, **changes: Any) -> Recipe:
    return {"source": {"kind": "builtin", "name": "orders"}, "limit": count, **changes}


def held_out(name: str = "orders", count: int = 16, **changes: Any) -> Recipe:
    return {"name": name, "source": {"kind": "builtin", "name": name, "split": "test"}, "limit": count, **changes}


def recipe(sources: list[Recipe], evaluation: list[Recipe], method: Recipe, **changes: Any) -> Recipe:
    """A recipe on the embedded model that logs every step."""
    settings = {"epochs": 2, "global_batch_size": 8, "seed": 17} | changes.pop("train", {})
    data = {"train": sources, "evaluation": evaluation, "max_length": 512} | changes.pop("data", {})
    every = {"log": 1, "evaluate": 10, "save": 1000, "keep": 1}
    base: Recipe = {"version": 1, "model": {"base": "builtin:tiny"}, "data": data, "method": method, "train": settings, "every": every}
    return base | changes


LORA: Recipe = {"kind": "lora", "rank": 8}
RETAINED = held_out("stories", 12, role="retained")


def overfitting(folder: Path) -> Recipe:
    few = {**STORIES, "limit": 8}
    return recipe([few], [held_out("stories", 12)], {"kind": "full"}, train={"epochs": 30})


def underfitting(folder: Path) -> Recipe:
    return recipe(
        [orders(64)], [held_out()], {"kind": "lora", "rank": 1, "target_modules": ["layers.0.self_attn.k_proj"]}, train={"epochs": 6}
    )


def rate_too_high(folder: Path) -> Recipe:
    return recipe([orders(160)], [held_out()], {"kind": "full"}, train={"lr": 0.05})


def rate_too_low(folder: Path) -> Recipe:
    return recipe([orders(160)], [held_out()], LORA, train={"lr": 1e-6})


def forgetting(folder: Path) -> Recipe:
    return recipe([orders(160)], [held_out(), RETAINED], {"kind": "full"}, train={"lr": 2e-3})


def leakage(folder: Path) -> Recipe:
    leaked = file_of(folder, "leaked", rows_of("orders", "train", 56) + rows_of("orders", "test", 8))
    return recipe([{"source": leaked}], [held_out()], LORA)


def dead_adapter(folder: Path) -> Recipe:
    return recipe([orders(64)], [held_out()], LORA | {"alpha": 1e-7})


def too_few_steps(folder: Path) -> Recipe:
    return recipe([orders(96)], [held_out()], LORA, train={"epochs": 1})


def length_truncation(folder: Path) -> Recipe:
    data = {"max_length": 90, "on_overflow": "truncate_prompt"}
    return recipe([orders(64)], [held_out()], LORA, data=data)


def template_of_another_model(folder: Path) -> Recipe:
    return recipe([orders(64)], [held_out()], LORA, model={"base": "builtin:tiny", "template": "plain"})


def template_inside_the_rows(folder: Path) -> Recipe:
    rows = rows_of("orders", "train", 64)
    for row in rows:
        for message in row["messages"]:
            if message["role"] == "user":
                message["content"] = f"[INST] {message['content']} [/INST]"
    return recipe([{"source": file_of(folder, "marked", rows)}], [held_out()], LORA)


def prompts_trained_by_weight(folder: Path) -> Recipe:
    objective = {"kind": "causal-lm", "prompt_loss_weight": 1.0}
    return recipe([orders(64)], [held_out()], LORA, objective=objective)


def prompts_trained_as_text(folder: Path) -> Recipe:
    texts = [{"text": _rendered(row["messages"])} for row in rows_of("orders", "train", 64)]
    source = {"source": file_of(folder, "rendered", texts), "format": {"kind": "text"}}
    return recipe([source], [held_out()], LORA)


def _rendered(messages: list[dict[str, str]]) -> str:
    return "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)


SICK: dict[str, tuple[str, Callable[[Path], Recipe]]] = {
    "overfitting": ("overfitting", overfitting),
    "underfitting": ("underfitting", underfitting),
    "rate too high": ("rate too high", rate_too_high),
    "rate too low": ("rate too low", rate_too_low),
    "forgetting": ("forgetting", forgetting),
    "leakage": ("leakage", leakage),
    "dead adapter": ("dead adapter", dead_adapter),
    "too few steps": ("too few steps", too_few_steps),
    "length truncation": ("length truncation", length_truncation),
    "another template": ("template mismatch", template_of_another_model),
    "a template in the rows": ("template mismatch", template_inside_the_rows),
    "prompts by weight": ("prompts trained", prompts_trained_by_weight),
    "prompts as text": ("prompts trained", prompts_trained_as_text),
}


def healthy_lora(folder: Path) -> Recipe:
    replay = {**STORIES, "limit": 40, "role": "replay", "weight": 0.1}
    return recipe([orders(128), replay], [held_out(), RETAINED], LORA, train={"epochs": 4}, data={"mixture": {"kind": "passes"}})


def healthy_full(folder: Path) -> Recipe:
    replay = {**STORIES, "limit": 96, "role": "replay", "weight": 1.0}
    return recipe([orders(128), replay], [held_out(), RETAINED], {"kind": "full"}, train={"epochs": 3})


def healthy_bitfit(folder: Path) -> Recipe:
    return recipe([orders(128)], [held_out()], {"kind": "bitfit", "add_biases": True}, train={"epochs": 6})


def healthy_text(folder: Path) -> Recipe:
    return recipe([{**STORIES, "limit": 96}], [held_out("stories", 12)], LORA, train={"epochs": 1})


def healthy_labels(folder: Path) -> Recipe:
    reviews = {"source": {"kind": "builtin", "name": "reviews"}, "limit": 128}
    return recipe([reviews], [held_out("reviews")], LORA, objective={"kind": "classification"}, train={"epochs": 3})


def healthy_holdout(folder: Path) -> Recipe:
    return recipe([orders(160)], [], LORA, train={"epochs": 4})


HEALTHY: dict[str, Callable[[Path], Recipe]] = {
    "lora with replay": healthy_lora,
    "full with replay": healthy_full,
    "bitfit": healthy_bitfit,
    "more stories": healthy_text,
    "labels": healthy_labels,
    "rows held out": healthy_holdout,
}


def train(values: Recipe, name: str, folder: Path) -> Path:
    """A run of a recipe; what it says goes nowhere."""
    output = folder / name.replace(" ", "-")
    path = folder / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump({**values, "name": output.name, "output": str(output)}, sort_keys=False), encoding="utf-8")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = ftcli(["train", str(path)])
    if code not in (0, 1):
        raise SystemExit(f"{name}: exit {code}\n{said.getvalue()}")
    return output


def found_in(path: Path) -> list[str]:
    return [finding.name for finding in diagnose(read_run(path)).findings]


def smoke_runs(folder: Path) -> dict[str, Path]:
    """Every smoke recipe, trained."""
    runs = {}
    for path in sorted((ROOT / "recipes" / "smoke").glob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        output = folder / f"smoke-{path.stem}"
        with contextlib.redirect_stdout(io.StringIO()):
            code = ftcli(["train", str(path), "--set", f"output={output}"])
        if code == 0:
            runs[f"smoke: {values['name']}"] = output
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the runs go and stay; a temporary one without it")
    parser.add_argument("--only", nargs="*", help="names of sick or healthy runs")
    parser.add_argument("--no-smoke", action="store_true", help="leave the smoke recipes out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        table = _sick(folder, arguments.only)
        _healthy(folder, arguments.only, with_smoke=not arguments.no_smoke)
    _confusion(table)


def _sick(folder: Path, only: list[str] | None) -> list[tuple[str, list[str]]]:
    table = []
    print(f"{'made sick by':<24} {'named first':<18} also named")
    for name, (sickness, make) in SICK.items():
        if only and name not in only:
            continue
        found = found_in(train(make(folder), name, folder))
        table.append((sickness, found))
        mark = "" if found[:1] == [sickness] else ("  (not first)" if sickness in found else "  (MISSED)")
        print(f"{name:<24} {found[0] if found else '-':<18} {', '.join(found[1:]) or '-'}{mark}", flush=True)
    return table


def _healthy(folder: Path, only: list[str] | None, *, with_smoke: bool) -> None:
    runs = {name: train(make(folder), f"healthy {name}", folder) for name, make in HEALTHY.items() if not only or name in only}
    runs |= smoke_runs(folder) if with_smoke and not only else {}
    alarms = {name: found for name, path in runs.items() if (found := found_in(path))}
    print(f"\n{len(runs)} healthy runs, {len(alarms)} with a finding")
    for name, found in alarms.items():
        print(f"  {name}: {', '.join(found)}")


def _confusion(table: list[tuple[str, list[str]]]) -> None:
    named = [rule for rule in RULES if any(rule in found for _, found in table)]
    print("\nmade sick \\ found (first, +also)\n" + " " * 18 + " ".join(f"{rule[:9]:>9}" for rule in named))
    for sickness in dict.fromkeys(sickness for sickness, _ in table):
        rows = [found for other, found in table if other == sickness]
        cells = [(sum(found[:1] == [rule] for found in rows), sum(rule in found[1:] for found in rows)) for rule in named]
        print(f"{sickness:<18}" + " ".join(f"{first or '.'!s:>6}{f'+{also}' if also else '':>3}" for first, also in cells))


if __name__ == "__main__":
    sys.exit(main())
