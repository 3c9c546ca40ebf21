"""The classification objective, its measures, and what a run of it leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn import metrics as sk
from tests.conftest import ROOT

from ftcli.cli.main import run
from ftcli.errors import RequestError
from ftcli.metrics import classification as metrics
from ftcli.models.tokenizer import load_tokenizer
from ftcli.objectives.classification import Classification, OutOfScope
from ftcli.objectives.label_words import LabelWords
from ftcli.recipe.load import load_recipe
from ftcli.reporting.live import Reporter
from ftcli.training.run import run_recipe

TEMPLATE = "Review: {text}\nOpinion:"


# ---- measures agree with scikit-learn ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predictions() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(4)
    probabilities = generator.dirichlet(np.full(5, 0.4), 300)
    truth = np.where(generator.random(300) < 0.6, probabilities.argmax(axis=1), generator.integers(0, 4, 300))
    return probabilities, truth


def test_measures_of_one_label_agree_with_scikit_learn(predictions: tuple[np.ndarray, np.ndarray]) -> None:
    probabilities, truth = predictions
    predicted = probabilities.argmax(axis=1)
    found = metrics.single_label_measures(probabilities, truth)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(sk.f1_score(truth, predicted, average="macro"), abs=1e-12)
    assert found["brier"] == pytest.approx(((probabilities - np.eye(5)[truth]) ** 2).sum(axis=1).mean(), abs=1e-12)
    assert metrics.confusion(truth, predicted, 5).tolist() == sk.confusion_matrix(truth, predicted, labels=range(5)).tolist()
    rows = metrics.per_class(truth, predicted, 5)
    expected = sk.precision_recall_fscore_support(truth, predicted, labels=range(5), zero_division=0)
    for name, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [row[name] for row in rows] == pytest.approx(column.tolist(), abs=1e-12)


def test_brier_of_two_classes_agrees_with_scikit_learn() -> None:
    second = np.array([0.1, 0.8, 0.4, 0.9])
    truth = np.array([0, 1, 1, 0])
    # scikit-learn halves the sum over both classes
    assert metrics.brier_score(np.stack([1 - second, second], axis=1), truth) == pytest.approx(2 * sk.brier_score_loss(truth, second))


def test_an_unseen_label_counts_as_wrong_as_a_class_that_is_never_predicted() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    truth, predicted = np.array([0, 1, metrics.UNSEEN]), np.array([0, 1, 0])
    found = metrics.single_label_measures(probabilities, truth)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx(sk.f1_score(truth, predicted, average="macro"))
    assert metrics.confusion(truth, predicted, 2).sum() == 2
    assert found["brier"] == pytest.approx((0.02 + 0.08 + (0.49 + 0.09 + 1)) / 3)


def test_calibration_error_by_hand() -> None:
    """Two rows of confidence 0.95, one of them right, and two of 0.55, both right: (|1 - 1.9| + |2 - 1.1|) / 4."""
    probabilities = np.array([[0.95, 0.05], [0.05, 0.95], [0.55, 0.45], [0.55, 0.45]])
    assert metrics.calibration_error(probabilities, np.array([0, 0, 0, 0])) == pytest.approx(0.45)
    assert metrics.calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0.0


def test_measures_of_several_labels_agree_with_scikit_learn() -> None:
    generator = np.random.default_rng(1)
    probabilities, truth = generator.random((80, 4)), generator.integers(0, 2, (80, 4))
    predicted = (probabilities >= 0.5).astype(int)
    found = metrics.multi_label_measures(probabilities, truth, np.zeros(80, dtype=int))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted))
    assert found["micro_f1"] == pytest.approx(sk.f1_score(truth, predicted, average="micro"))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(truth, predicted, average="macro"))
    missed = metrics.multi_label_measures(truth.astype(float), truth, np.ones(80, dtype=int))
    assert missed["accuracy"] == 0.0
    assert missed["micro_f1"] < 1.0


def test_measures_of_numbers_agree_with_scikit_learn() -> None:
    generator = np.random.default_rng(2)
    truth = generator.normal(size=50)
    values = truth + generator.normal(size=50) / 2
    found = metrics.regression_measures(values, truth)
    assert found["rmse"] == pytest.approx(sk.root_mean_squared_error(truth, values))
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(truth, values))
    assert found["r2"] == pytest.approx(sk.r2_score(truth, values))
    assert found["pearson"] == pytest.approx(np.corrcoef(truth, values)[0, 1])
    assert metrics.regression_measures(np.ones(3), np.ones(3))["r2"] is None


@pytest.mark.parametrize(
    ("confidence", "is_right", "is_outside", "expected"),
    [
        ([0.9, 0.8, 0.4, 0.3], [True, True, False, False], [False, False, True, True], 0.6),
        ([0.9, 0.8], [True, True], [False, False], 0.0),
        ([0.9, 0.8], [False, False], [True, True], 1.0),
        ([0.5, 0.5], [True, False], [False, True], 0.0),
    ],
)
def test_the_best_threshold_by_hand(confidence: list[float], is_right: list[bool], is_outside: list[bool], expected: float) -> None:
    assert metrics.best_threshold(np.array(confidence), np.array(is_right), np.array(is_outside)) == pytest.approx(expected)


# ---- the objective -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"readout": "label-words", "task": "multi"}, "`task: multi` with `readout: label-words`"),
        ({"readout": "label-words", "pooling": "mean"}, "`pooling` with `readout: label-words`"),
        ({"words": {"a": " b"}}, "`words` or `length_normalised` with `readout: head`"),
        ({"length_normalised": True}, "`words` or `length_normalised` with `readout: head`"),
        ({"task": "multi", "out_of_scope": OutOfScope()}, "`out_of_scope` with `task: multi`"),
        ({"task": "regression", "class_weights": "balanced"}, "`class_weights` or `labels` with `task: regression`"),
    ],
)
def test_options_of_another_choice_are_refused(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Classification(**settings)


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    from collections import Counter

    from sklearn.utils.class_weight import compute_class_weight

    truth = ["a"] * 5 + ["b"] * 2 + ["c"] * 13
    expected = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=truth)
    found = Classification(labels=("a", "b", "c"), class_weights="balanced")._class_weights(Counter(truth))
    assert found == pytest.approx(expected.tolist())


def test_words_end_with_eos_only_where_one_begins_another() -> None:
    tokenizer = load_tokenizer("builtin:tiny")
    apart = LabelWords.encoded([" good", " bad"], tokenizer)
    assert all(tokenizer.eos_id not in ids for ids in apart.ids)
    nested = LabelWords.encoded([" good", " good work"], tokenizer)
    assert all(ids[-1] == tokenizer.eos_id for ids in nested.ids)
    with pytest.raises(RequestError, match="` good` has the tokens of another word"):
        LabelWords.encoded([" good", " good"], tokenizer)


# ---- runs --------------------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [{"text": f"the {word} story {index}", "label": label} for index in range(6) for word, label in (("good", "up"), ("bad", "down"))]


def recipe(folder: Path, rows: list[dict[str, Any]], evaluation: list[dict[str, Any]] | None = None, **sections: Any) -> Path:
    data: dict[str, Any] = {"train": [{"source": {"kind": "file", "path": write_rows(folder / "train.jsonl", rows)}}], "holdout": 0.0}
    if evaluation is not None:
        data["evaluation"] = [{"name": "test", "source": {"kind": "file", "path": write_rows(folder / "test.jsonl", evaluation)}}]
    document = {
        "version": 1,
        "name": "labels",
        "model": {"base": "builtin:tiny"},
        "data": data,
        "method": {"kind": "full"},
        "objective": {"kind": "classification"},
        "train": {"steps": 2, "global_batch_size": 4},
        "output": str(folder / "run"),
        **sections,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(document))
    return path


def told(capsys: pytest.CaptureFixture[str], path: Path, code: int = 2) -> str:
    assert run(["train", str(path)]) == code
    return capsys.readouterr().err


def test_a_label_that_training_never_saw_is_an_error_that_lists_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strange = [*ROWS, {"text": "a", "label": "sideways"}, {"text": "b", "label": "sideways"}]
    error = told(capsys, recipe(tmp_path, ROWS, strange))
    assert "evaluation has labels that training never saw" in error
    assert "test: `sideways` (2)" in error
    assert "`objective.unseen_labels: count-as-wrong`" in error
    assert not (tmp_path / "run").exists()


def test_a_label_that_training_never_saw_counts_as_wrong_where_that_is_asked_for(tmp_path: Path) -> None:
    objective = {"kind": "classification", "unseen_labels": "count-as-wrong"}
    strange = [{"text": "a", "label": "sideways"}, *ROWS[:3]]
    assert run(["train", str(recipe(tmp_path, ROWS, strange, objective=objective))]) == 0
    report = json.loads((tmp_path / "run" / "classification-test.json").read_text())
    assert report["unseen_labels"] == 1
    assert report["examples"] == 4
    assert report["accuracy"] <= 0.75
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["sources"]["test"]["targets"] == 3


@pytest.mark.parametrize(
    ("train", "objective", "error"),
    [
        ([{"text": "a", "label": "x"}], {}, "found `x`, allowed: two or more"),
        ([{"text": "a", "label": ["x", "y"]}], {}, "has 2 labels, not one"),
        ([{"text": "a", "label": "x"}], {"task": "regression"}, "the label `x` is not a number"),
        (ROWS, {"labels": ["up"]}, "has labels that are not listed: `down`"),
        (ROWS, {"class_weights": {"upp": 2.0}}, "did you mean `up`?"),
        (ROWS, {"class_weights": {"up": 0.0}}, "found 0.0, allowed: above 0"),
        (ROWS, {"readout": "label-words", "words": {"dwn": " bad"}}, "did you mean `down`?"),
        (ROWS, {"readout": "label-words", "words": {"up": " down"}}, "has the tokens of another word"),
        (ROWS, {"out_of_scope": {"label": "down"}}, "6 rows have the label `down`"),
        (ROWS, {"pooling": "first"}, "cannot read the `first` token"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    train: list[dict[str, Any]], objective: dict[str, Any], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error in told(capsys, recipe(tmp_path, train, objective={"kind": "classification", **objective}))


def test_generated_answers_are_refused_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, ROWS, ROWS)
    document = json.loads(path.read_text())
    document["data"]["evaluation"][0]["generate"] = {"metrics": [{"kind": "exact-match"}]}
    path.write_text(json.dumps(document))
    assert "a classifier generates no answers" in told(capsys, path)


def test_held_out_rows_that_are_all_out_of_scope_measure_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objective = {"kind": "classification", "out_of_scope": {"label": "oos"}}
    assert "no row has a label that is trained" in told(
        capsys, recipe(tmp_path, ROWS, [{"text": "a", "label": "oos"}], objective=objective)
    )


def test_the_report_shows_labels_and_their_confusion(finished: Path) -> None:
    from ftcli.reporting.labels import label_blocks
    from ftcli.reporting.page import Document, Section, html_page

    report = {
        "source": "a<b",
        "classes": [{"label": "x&y", "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 3}],
        "confusion": {"labels": ["x&y"], "rows_are": "truth", "counts": [[3]]},
    }
    (finished.parent / "classification-test.json").write_text(json.dumps(report))
    section = html_page(Document("run", "finished", "good", [], [Section("Labels", label_blocks(finished.parent))]))
    assert "a&lt;b" in section
    assert re.search(r"x&amp;y</th>.*>50.0 %<.*>100.0 %<.*>66.7 %<.*>3<", section)
    assert "<svg" in section
    assert label_blocks(finished) == []


def test_an_adapter_with_its_head_loads_in_plain_peft_and_a_merged_one_in_plain_transformers(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from ftcli.builtin.catalogue import model_folder
    from ftcli.exporting.predict import predict_file

    path = recipe(tmp_path, ROWS, ROWS[:4], method={"kind": "lora", "rank": 4}, train={"steps": 6, "global_batch_size": 4})
    assert run(["train", str(path)]) == 0
    folder = tmp_path / "run"
    assert run(["merge", str(folder), "--dtype", "float32"]) == 0
    ours = predict_file(str(folder), tmp_path / "test.jsonl")
    assert [row.label for row in predict_file(str(folder / "merged"), tmp_path / "test.jsonl")] == [row.label for row in ours]
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert "score" in config["modules_to_save"]
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "merged")
    assert merged.config.id2label == {0: "down", 1: "up"}
    torch.manual_seed(99)  # another fresh head than the run's: the adapter must bring its own
    base = AutoModelForSequenceClassification.from_pretrained(model_folder("tiny"), num_labels=2, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    for row, prediction in zip(ROWS[:4], ours, strict=True):
        ids = tokenizer(row["text"], return_tensors="pt", add_special_tokens=tokenizer.bos_token is not None)["input_ids"]
        for model in (merged.eval(), adapted):
            with torch.no_grad():
                probabilities = model(input_ids=ids).logits.softmax(-1)[0]
            assert float(probabilities.max()) == pytest.approx(prediction.probability, abs=1e-4)


def test_out_of_scope_texts_are_called_so_with_a_threshold_from_held_out_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strange = [{"text": f"{word} {index}", "label": "oos"} for index, word in enumerate(("zebra", "quark", "harbour", "lamp"))]
    objective = {"kind": "classification", "out_of_scope": {"label": "oos"}}
    path = recipe(tmp_path, ROWS, [*ROWS, *strange], objective=objective, train={"steps": 30, "global_batch_size": 6})
    assert run(["train", str(path)]) == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["sources"]["test"]
    assert {"threshold", "accuracy_with_out_of_scope", "out_of_scope_recall", "out_of_scope_precision"} <= set(last)
    assert last["targets"] == len(ROWS)
    capsys.readouterr()
    assert run(["predict", str(tmp_path / "run"), "--data", str(tmp_path / "test.jsonl"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["predictions"]
    assert [row["out_of_scope"] for row in rows] == [row["probability"] < last["threshold"] for row in rows]
    assert all((row["label"] == "oos") == row["out_of_scope"] for row in rows)


def test_the_resolved_recipe_holds_the_labels_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, ROWS)
    assert run(["train", str(path)]) == 0
    assert yaml.safe_load((tmp_path / "run" / "recipe.resolved.yaml").read_text())["objective"]["labels"] == ["down", "up"]
    assert run(["train", str(path), "--resume"]) == 0
    assert run(["train", str(path), "--resume", "--set", "objective.labels=[up, down]"]) == 2
    assert "objective.labels" in capsys.readouterr().err


def test_a_file_is_predicted_without_labels_in_its_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(recipe(tmp_path, ROWS, train={"steps": 20, "global_batch_size": 6, "lr": 1e-3}))]) == 0
    texts = [{"text": row["text"]} for row in ROWS]
    data, out = write_rows(tmp_path / "asked.jsonl", texts), tmp_path / "out.jsonl"
    capsys.readouterr()
    assert run(["predict", str(tmp_path / "run"), "--data", data, "-o", str(out)]) == 0
    assert "12 predictions" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["label"] for row in rows] == [row["label"] for row in ROWS]
    assert [row["where"] for row in rows] == [f"asked.jsonl:{index + 1}" for index in range(12)]


@pytest.mark.parametrize(
    ("target", "rows", "error"),
    [
        ("builtin:tiny", [{"text": "a"}], "is no classifier"),
        ("run", [{"story": "a"}], "has no column with a text"),
        ("run", [{"text": "a"}, {"text": 3}], "column `text` is a number, not a text"),
        ("run", [{"text": "word " * 2000}], "and the classifier was trained on 1024 at most"),
    ],
)
def test_what_cannot_be_predicted_is_said(
    target: str, rows: list[dict[str, Any]], error: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows)
    assert run(["predict", str(finished) if target == "run" else target, "--data", data]) == 2
    assert error in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert run(["train", str(recipe(folder, ROWS))]) == 0
    return folder / "run"


def test_a_classifier_does_not_generate_and_says_what_does(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(finished), "hello"]) == 2
    assert "ftcli predict" in capsys.readouterr().err


def test_a_prompt_is_computed_once_for_all_labels() -> None:
    """The words of 2, 3 and 1 tokens come to the text's own, which stands there once."""
    from tests.laws.test_classification import WORDS, labelled_trees

    tree = labelled_trees([("a",)])[0]
    objective = Classification(labels=("a", "b", "c"), readout="label-words")
    objective._words = WORDS
    assert len(objective.pose(tree).tree) == len(tree) + 6


@pytest.mark.parametrize(
    "method", [{"kind": "ia3"}, {"kind": "adalora"}, {"kind": "peft", "type": "oft"}, {"kind": "bitfit", "add_biases": True}], ids=str
)
def test_a_head_trains_and_is_saved_beside_every_kind_of_adapter(method: dict[str, Any], tmp_path: Path) -> None:
    document = yaml.safe_load((ROOT / "recipes" / "smoke" / "classification-head.yaml").read_text())
    document |= {"method": method, "train": {"steps": 2, "global_batch_size": 4}, "output": str(tmp_path / "run")}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(document))
    with Reporter(silent=True) as reporter:
        summary = run_recipe(load_recipe(path), reporter)
    assert {proof["name"]: proof["passed"] for proof in summary["proofs"]}["saved = trained"]


@pytest.mark.parametrize("kind", ["adapter", "prompt", "prefix", "adamix"])
def test_methods_that_cannot_keep_a_head_say_so(kind: str, tmp_path: Path) -> None:
    document = yaml.safe_load((ROOT / "recipes" / "smoke" / "classification-head.yaml").read_text())
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**document, "method": {"kind": kind}, "output": str(tmp_path / "run")}))
    with Reporter(silent=True) as reporter, pytest.raises(RequestError, match="does not fit the objective"):
        run_recipe(load_recipe(path), reporter)
