"""Each sickness of a run is named from its curves and numbers, and a healthy run is left alone."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import ROOT
from tests.fake_run import data_report, source_values, write_fake_run, write_lines

from ftcli.cli.main import run as ftcli
from ftcli.reporting.diagnosis.diagnose import RULES, Diagnosis, diagnose
from ftcli.reporting.found_run import read_run

Curve = Callable[[float], float]
"""Share of the way in 0..1 -> loss."""
Make = Callable[..., Diagnosis]


def falling(share: float) -> float:
    """A loss as a healthy run has it: fast, then slower, at rest in the end."""
    return 0.1 + 2.0 * math.exp(-8 * share)


HEALTHY: dict[str, Any] = {
    "repeats": [3.0],
    "default_lr": 2e-4,
    "probe_change": {"mean": 0.8, "largest": 6.0},
    "audit": {"num_overlap": {}, "overlap": []},
    "template": {"asked": None, "base_has_one": True, "is_the_bases": True},
    "mask_samples": [{"source": "orders", "where": "row 1", "pieces": [["Hi", 0.0], ["{}", 1.0]], "foreign_markers": []}],
    "data": [data_report("orders", "chat"), data_report("stories", "text"), data_report("orders", "chat", num_examples=100)],
}


@pytest.fixture
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The diagnosis of a run with these curves and facts."""

    def _made(
        train: Curve = falling,
        held_out: Sequence[tuple[int, float]] = ((0, 2.4), (20, 0.4), (40, 0.35)),
        retained: Sequence[tuple[int, float]] = (),
        steps: int = 40,
        recipe: str = "",
        rate: float = 2e-4,
        **changes: Any,
    ) -> Diagnosis:
        path = write_fake_run(tmp_path_factory.mktemp("made") / "run", **(HEALTHY | changes))
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "lr": rate}))
        records: list[dict[str, Any]] = [
            {"kind": "train", "step": step, "loss": train(step / steps), "grad_norm": 1.0, "sources": {}} for step in range(1, steps + 1)
        ]
        for role, points in (("target", held_out), ("retained", retained)):
            for step, loss in points:
                records.append({"kind": "evaluate", "step": step, "sources": {role: source_values(loss, role)}})
        write_lines(path / "metrics.jsonl", records)
        if recipe:
            text = (path / "recipe.resolved.yaml").read_text()
            (path / "recipe.resolved.yaml").write_text(text + recipe)
        return diagnose(read_run(path))

    return _made


def names(diagnosis: Diagnosis) -> list[str]:
    return [finding.name for finding in diagnosis.findings]


def test_a_healthy_run_is_left_alone_and_what_cannot_be_judged_is_said(made: Make) -> None:
    diagnosis = made()
    assert diagnosis.findings == ()
    assert diagnosis.unjudged == {"forgetting": "no evaluation source has role: retained"}
    assert diagnosis.lines()[0] == f"nothing found: {len(RULES) - 1} of {len(RULES)} rules looked"


def test_a_short_run_is_not_judged_by_its_curve(made: Make) -> None:
    diagnosis = made(steps=9)
    assert diagnosis.findings == ()
    assert {"underfitting", "rate too low"} <= set(diagnosis.unjudged)
    assert "too few steps" in made(steps=1).unjudged


def test_overfitting_names_the_step_from_which_it_got_worse(made: Make) -> None:
    diagnosis = made(held_out=[(0, 2.4), (10, 0.5), (40, 0.9)])
    assert names(diagnosis) == ["overfitting"]
    finding = diagnosis.findings[0]
    assert finding.evidence[0] == "held-out loss of `target`: 0.5000 at step 10, 0.9000 at step 40"
    assert "early_stopping" in finding.advice[0]


def test_a_held_out_loss_that_wavers_is_no_overfitting(made: Make) -> None:
    assert names(made(held_out=[(0, 2.4), (10, 0.50), (40, 0.52)])) == []


def test_rows_learnt_by_heart_with_one_evaluation(made: Make) -> None:
    assert names(made(lambda share: 0.01 + 2 * math.exp(-9 * share), held_out=[(0, 2.4), (40, 1.9)], repeats=[10.0])) == ["overfitting"]


def test_underfitting_is_a_rest_high_up(made: Make) -> None:
    high = made(lambda share: 1.6 + 0.4 * math.exp(-9 * share))
    assert names(high) == ["underfitting"]
    assert "1,000 of 3,000 numbers train" in high.findings[0].evidence


def test_plain_text_at_rest_is_no_underfitting(made: Make) -> None:
    assert names(made(lambda share: 1.6 + 0.4 * math.exp(-9 * share), data=[data_report("books", "text")])) == []


@pytest.mark.parametrize(
    "curve",
    [
        lambda share: 2.0 + 3 * share,
        lambda share: 2.0 if share < 0.2 else (9.0 if share < 0.4 else 1.9),
        lambda share: falling(share) if share < 0.6 else 1.8,
    ],
    ids=["diverges", "peak", "rebound"],
)
def test_a_rate_that_is_too_high(made: Make, curve: Curve) -> None:
    diagnosis = made(curve, rate=2e-2, retained=[(0, 1.0), (40, 3.0)])
    assert names(diagnosis) == ["rate too high"]
    assert any("100 times the method's default" in text for text in diagnosis.findings[0].evidence)


def test_a_rate_that_is_too_low_is_told_from_too_few_steps_by_the_default(made: Make) -> None:
    assert names(made(lambda share: 2.0 - 0.1 * share, rate=2e-6)) == ["rate too low"]


def test_too_few_steps_is_a_fall_that_goes_on(made: Make) -> None:
    assert names(made(lambda share: 4.0 - 2.5 * share, repeats=[0.5])) == ["too few steps"]


@pytest.mark.parametrize("steps", [2, 3, 9])
def test_too_few_steps_needs_few_logged_ones(made: Make, steps: int) -> None:
    found = made(lambda share: 6.5 - 3.5 * share, steps=steps, held_out=[(0, 6.9), (steps, 4.9)])
    assert names(found) == ["too few steps"]
    assert names(made(lambda share: 1.0, steps=steps)) == []


def test_a_rate_is_too_high_where_what_was_known_comes_apart_while_new_rows_are_learnt(made: Make) -> None:
    curve = {1: 6.53, 2: 7.19, 3: 4.56, 4: 4.31}
    facts: dict[str, Any] = {"steps": 4, "held_out": [(0, 6.9), (4, 4.3)], "retained": [(0, 0.51), (4, 9.86)]}
    assert names(made(lambda share: curve[round(4 * share)], rate=0.3, **facts)) == ["rate too high"]
    assert names(made(lambda share: curve[round(4 * share)], rate=2e-4, **facts)) == ["forgetting"]


def test_every_held_out_loss_higher_is_a_rate_too_high(made: Make) -> None:
    found = made(lambda share: 2.0, rate=2e-2, held_out=[(0, 2.0), (40, 3.0)], retained=[(0, 1.0), (40, 1.5)])
    assert names(found) == ["rate too high"]


def test_an_interrupted_run_is_judged_by_what_there_is(made: Make) -> None:
    stopped = made(lambda share: 6.5 + 1.2 * share, steps=9, rate=0.3, held_out=[(0, 6.9)], retained=[(0, 0.5)], status="interrupted")
    assert names(stopped) == ["rate too high"]
    assert stopped.unjudged["forgetting"] == "the retained sources were not measured both before and after training"


def test_rows_that_are_trained_on_in_other_case_or_within_a_longer_text_are_leaked(tmp_path: Path) -> None:
    rows = [{"prompt": f"what does article number {n} of the list cost today", "completion": f"it is {n} euros"} for n in range(40)]
    shouted = [{key: f"{value.upper()}!" for key, value in row.items()} for row in rows[:6]]
    longer = [{"prompt": f"Hello, {row['prompt']}", "completion": f"{row['completion']}, I think"} for row in rows[6:8]]
    path = write_fake_run(tmp_path / "run", **HEALTHY)
    data = "data: {train: [{source: {kind: file, path: train.jsonl}}], evaluation: [{source: {kind: file, path: test.jsonl}}]}\n"
    text = (path / "recipe.resolved.yaml").read_text()
    (path / "recipe.resolved.yaml").write_text(text[: text.index("data:")] + data + text[text.index("method:") :])

    def found(held_out: list[dict[str, str]]) -> Diagnosis:
        write_lines(path / "train.jsonl", rows[10:] + held_out)
        write_lines(path / "test.jsonl", rows[:10])
        return diagnose(read_run(path))

    assert names(found([])) == []
    leaked = found(shouted + longer)
    assert names(leaked) == ["leakage"]
    assert leaked.findings[0].evidence[0] == "8 of 10 rows of `test` are trained on, word for word"


def test_forgetting_and_its_evidence(made: Make) -> None:
    diagnosis = made(retained=[(0, 1.0), (40, 1.3)])
    assert names(diagnosis) == ["forgetting"]
    assert diagnosis.findings[0].evidence == (
        "loss on `retained`: 1.0000 before, 1.3000 at step 40 (+30 %), 0.5000 to 0.6500 bits per byte",
    )


def test_forgetting_a_little_is_the_price_of_learning(made: Make) -> None:
    assert names(made(retained=[(0, 1.0), (40, 1.04)])) == []


def test_leaked_rows_are_counted(made: Make) -> None:
    audit = {"num_overlap": {"orders": 12}, "overlap": [["test row 1", "train row 7"]]}
    diagnosis = made(audit=audit)
    assert names(diagnosis) == ["leakage"]
    assert diagnosis.findings[0].evidence[0] == "12 of 100 examples of `orders` are trained on, token for token"
    assert diagnosis.findings[0].evidence[1] == "test row 1 = train row 7"


def test_a_dead_adapter_explains_a_flat_curve(made: Make) -> None:
    change = {"mean": 1e-9, "largest": 1e-7}
    assert names(made(lambda share: 2.0, held_out=[(0, 2.4), (40, 2.4)], probe_change=change)) == ["dead adapter"]


def test_rows_that_were_cut(made: Make) -> None:
    cut = data_report("orders", "chat", on_overflow="truncate_prompt", num_overlong=400)
    assert names(made(data=[cut])) == ["length truncation"]


def test_text_that_was_split_has_lost_nothing(made: Make) -> None:
    assert names(made(data=[data_report("books", "text", on_overflow="split", num_overlong=400)])) == []


def test_another_template_than_the_bases(made: Make) -> None:
    note = {"asked": "plain", "base_has_one": True, "is_the_bases": False}
    assert names(made(template=note)) == ["template mismatch"]


def test_a_base_without_a_template_may_get_one(made: Make) -> None:
    note = {"asked": "chatml", "base_has_one": False, "is_the_bases": False}
    assert names(made(template=note)) == []


def test_markup_of_a_template_inside_the_rows(made: Make) -> None:
    sample = {"source": "orders", "where": "row 1", "pieces": [["x", 1.0]], "foreign_markers": ["[INST]"]}
    assert names(made(mask_samples=[sample])) == ["template mismatch"]


def test_prompts_that_are_trained_by_their_weight(made: Make) -> None:
    diagnosis = made(recipe="objective: {kind: causal-lm, prompt_loss_weight: 1.0}\n")
    assert names(diagnosis) == ["prompts trained"]
    assert "prompts have 63 % of the weight" in diagnosis.findings[0].evidence[0]


def test_chats_that_are_read_as_text(made: Make) -> None:
    sample = {"source": "books", "where": "row 1", "pieces": [["<|im_start|>user\nHi<|im_end|>", 1.0]], "foreign_markers": []}
    assert names(made(mask_samples=[sample], data=[data_report("books", "text")])) == ["prompts trained"]


def test_the_command_says_it_and_its_json_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_fake_run(tmp_path / "run", audit={"num_overlap": {"orders": 400}, "overlap": []})
    assert ftcli(["diagnose", str(path)]) == 0
    assert capsys.readouterr().out.startswith("leakage: rows that the model is measured on")
    assert ftcli(["diagnose", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["findings"][0]["name"] == "leakage"
    assert ftcli(["runs", "show", str(path)]) == 0
    assert "leakage" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["dead adapter", "leakage", "a template in the rows", "prompts as text"])
def test_runs_made_sick_are_named_by_their_sickness(name: str, tmp_path: Path) -> None:
    bench = runpy.run_path(str(ROOT / "scripts" / "bench" / "diagnosis.py"))
    sickness, make = bench["SICK"][name]
    recipe = make(tmp_path)
    recipe["train"] |= {"epochs": None, "steps": 4, "global_batch_size": 4}
    recipe["data"]["evaluation"][0]["limit"] = 4
    assert bench["found_in"](bench["train"](recipe, name, tmp_path))[:1] == [sickness]
