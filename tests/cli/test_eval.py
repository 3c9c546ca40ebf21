"""`ftcli eval`: figures that are right, models compared on the same rows, gates with exit codes, nothing measured twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcli.cli import main
from ftcli.evaluation.evaluate import changes, evaluate, open_subject
from ftcli.evaluation.recipe import load_evaluation_recipe
from ftcli.evaluation.tasks.language_modelling import LanguageModelling
from ftcli.evaluation.tasks.multiple_choice import MultipleChoice
from ftcli.evaluation.windows import windows

CHOICES = [
    {"question": "Lily lost her ball. The ball was", "choices": ["found", "xylophone quartz"], "answer": 0},
    {"question": "Once upon a", "choices": ["qq zz", "time"], "answer": "time"},
    {"question": "Tom was sad. He", "choices": ["cried", "vvv kkk jjj", "bzzt"], "answer": "A"},
]
TEXTS = [{"text": "Once upon a time there was a little dog. He was sad."}, {"text": "Mia had a red hat. " * 60}, {"text": "A"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FTCLI_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "choices.jsonl", CHOICES)
    write(tmp_path / "texts.jsonl", TEXTS)
    document = {
        "version": 1,
        "tasks": [
            {"name": "quiz", "kind": "multiple-choice", "source": {"kind": "file", "path": "choices.jsonl"}, "prompt": "{question}"},
            {"name": "texts", "kind": "language-modelling", "source": {"kind": "file", "path": "texts.jsonl"}, "retained": True},
        ],
    }
    path = tmp_path / "eval.yaml"
    path.write_text(json.dumps(document))
    return path


def test_multiple_choice_and_language_modelling_end_to_end(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["eval", "builtin:tiny", "--recipe", str(recipe), "--json", "--gate", "quiz.accuracy >= 0.9"]) == 0
    report = json.loads(capsys.readouterr().out)
    tasks = report["models"]["builtin:tiny"]["tasks"]
    assert tasks["quiz"]["figures"]["accuracy"]["value"] == 1.0
    assert tasks["quiz"]["figures"]["accuracy"]["low"] < 0.5  # three rows say little
    assert 0 < tasks["texts"]["figures"]["bits_per_byte"]["value"] < 8
    assert report["gates"]["builtin:tiny"][0]["passed"]
    assert report["models"]["builtin:tiny"]["precision"] == "float32"


DAMAGE = {
    "half a result": (".json", lambda text: text[:200]),
    "nothing": (".json", lambda text: ""),
    "null": (".json", lambda text: "null"),
    "a list": (".json", lambda text: "[]"),
    "no figures": (".json", lambda text: text.replace('"figures"', '"numbers"')),
    "a figure is a text": (".json", lambda text: text.replace('"figures": {', '"figures": {"x": "y", ')),
    "half of the rows": (".jsonl", lambda text: text[: len(text) // 2]),
    "a row less": (".jsonl", lambda text: "".join(text.splitlines(keepends=True)[:-1])),
    "another row": (".jsonl", lambda text: text.replace("dog", "cat")),
}


def test_a_damaged_result_is_measured_again(recipe: Path, tmp_path: Path) -> None:
    (task,) = load_evaluation_recipe(recipe).tasks[1:]
    cache = tmp_path / "kept"
    first = evaluate("builtin:tiny", [task], cache=cache, device="cpu")
    (kept,) = cache.glob("*.json")
    whole = {ending: kept.with_suffix(ending).read_text() for ending in (".json", ".jsonl")}
    assert evaluate("builtin:tiny", [task], cache=cache, device="cpu").reused == ["texts"]
    for name, (ending, damage) in DAMAGE.items():
        damaged = damage(whole[ending])
        assert damaged != whole[ending], name
        kept.with_suffix(ending).write_text(damaged)
        again = evaluate("builtin:tiny", [task], cache=cache, device="cpu")
        assert again.reused == [], name
        assert list(again.results["texts"].rows) == list(first.results["texts"].rows)
        assert {ending: kept.with_suffix(ending).read_text() for ending in whole} == whole


def test_a_failed_gate_is_exit_code_3_and_stands_in_the_junit_file(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    code = main.run(["eval", "builtin:tiny", "-r", str(recipe), "--gate", "texts.bits_per_byte <= 0.01", "-o", str(folder)])
    assert code == 3
    assert "FAILS: texts.bits_per_byte <= 0.01" in capsys.readouterr().err
    assert 'failures="1"' in (folder / "gates.xml").read_text()
    assert len((folder / "samples-quiz-0.jsonl").read_text().splitlines()) == len(CHOICES)


def test_what_was_measured_is_not_measured_again_and_changed_rows_are(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reused() -> list[bool]:
        assert main.run(["eval", "builtin:tiny", "-r", str(recipe), "--json"]) == 0
        tasks = json.loads(capsys.readouterr().out)["models"]["builtin:tiny"]["tasks"]
        return [tasks["quiz"]["reused"], tasks["texts"]["reused"]]

    assert reused() == [False, False]
    assert reused() == [True, True]
    write(recipe.parent / "choices.jsonl", CHOICES[:2])
    assert reused() == [False, True]


def test_a_model_against_itself_has_changed_nothing(recipe: Path, tmp_path: Path) -> None:
    tasks = load_evaluation_recipe(recipe).tasks
    once = evaluate("builtin:tiny", tasks, cache=tmp_path / "kept")
    again = evaluate("builtin:tiny", tasks, cache=tmp_path / "kept")
    assert again.reused == ["quiz", "texts"]
    for change in changes(again, once, tasks):
        assert (change.comparison.difference.value, change.adjusted_p, change.lost, change.gained) == (0.0, 1.0, [], [])


def test_bits_per_byte_in_windows_counts_every_token_once(tmp_path: Path) -> None:
    _, subject = open_subject("builtin:tiny", "cpu")
    path = write(tmp_path / "texts.jsonl", TEXTS)

    def measured(**settings: int) -> Any:
        document = {"name": "t", "kind": "language-modelling", "source": {"kind": "file", "path": str(path)}, **settings}
        return LanguageModelling.model_validate(document).measure(subject)

    whole, cut = measured(), measured(window=32, stride=16)
    assert cut.figures["bits_per_byte"].interval.value > whole.figures["bits_per_byte"].interval.value
    subject.model.use_layout("rows")
    model, tokenizer = subject.model.module, subject.tokenizer
    nats = 0.0
    for row in TEXTS:
        ids = [tokenizer.eos_id, *tokenizer.encode(row["text"])[0]]
        with torch.inference_mode():
            log_probs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        nats -= sum(float(log_probs[place, token]) for place, token in enumerate(ids[1:]))
    num_bytes = sum(len(row["text"].encode()) for row in TEXTS)
    assert whole.figures["bits_per_byte"].interval.value == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)


@pytest.mark.parametrize(("length", "window", "stride"), [(1, 8, 4), (2, 8, 4), (8, 8, 4), (9, 8, 4), (100, 8, 7), (100, 8, 1)])
def test_windows_predict_every_token_but_the_first_once(length: int, window: int, stride: int) -> None:
    found = windows(length, window, stride)
    assert [token for _, begin, end in found for token in range(begin, end)] == list(range(1, length))
    assert all(end - start <= window and start < begin for start, begin, end in found)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([{"question": "a", "choices": ["b", "c"]}], "choices.jsonl:1: column `answer` is missing"),
        ([{"question": "a", "choices": ["b", "c"], "answer": 4}], "choices.jsonl:1: column `answer`: `4` is none of the choices"),
        ([{"question": "a", "choices": 7, "answer": 0}], "choices.jsonl:1: column `choices` is not a list of texts"),
        ([{"question": ["a"], "choices": ["b", "c"], "answer": 0}], "choices.jsonl:1: column `question` is list, not a text"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(
    rows: list[dict[str, Any]], message: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(recipe.parent / "choices.jsonl", rows)
    assert main.run(["eval", "builtin:tiny", "-r", str(recipe)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "multiple-choise"}, "unknown kind `multiple-choise`"),
        ({"anwser": "label"}, "unknown key"),
        ({"name": "texts"}, "is the name of tasks.0, too"),
    ],
)
def test_a_wrong_recipe_is_refused_with_line_and_hint(
    change: dict[str, str], message: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(recipe.read_text())
    document["tasks"][0] |= change
    recipe.write_text(json.dumps(document))
    assert main.run(["eval", "builtin:tiny", "-r", str(recipe)]) == 2
    assert message in capsys.readouterr().err


def test_few_shot_examples_never_hold_the_question_that_is_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "choices.jsonl", [{"question": f"number {n}", "choices": ["a", "b"], "answer": n % 2} for n in range(12)])
    _, subject = open_subject("builtin:tiny", "cpu")
    for choose in ("fixed", "random", "nearest"):
        document = {"name": "q", "kind": "multiple-choice", "source": {"kind": "file", "path": str(path)}}
        task = MultipleChoice.model_validate({**document, "shots": {"count": 3, "choose": choose}, "prompt": "{question}:"})
        assert len(task.measure(subject).rows) == 12


def test_no_recipe_and_no_data_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["eval", "builtin:tiny"]) == 2
    assert "needs `--recipe FILE` or `--data FILE`" in capsys.readouterr().err
