"""Features: computed once, fitted at once, kept as numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ftcli.cli.main import run
from ftcli.errors import MissingExtraError, RequestError
from ftcli.layout.model import TreeModel, inner_model
from ftcli.methods.context import AttachContext
from ftcli.methods.feature_head import FeatureHead, FeatureSet, fit
from ftcli.methods.features import Features, feature_head


def feature_set(num_classes: int = 3, count: int = 150, width: int = 8) -> FeatureSet:
    """Clouds around a centre for each class, far from centred and of very different scales; some examples count more."""
    generator = torch.Generator().manual_seed(num_classes)
    labels = torch.randint(0, num_classes, (count,), generator=generator)
    centres = torch.randn(num_classes, width, generator=generator)
    scales = torch.logspace(-2, 2, width)
    vectors = (centres[labels] + torch.randn(count, width, generator=generator)) * scales + 5 * scales
    weights = 0.5 + torch.rand(count, generator=generator)
    return FeatureSet(vectors, labels[:, None].float(), weights, "single")


def fitted(data: FeatureSet, classifier: str, solver: str, num_classes: int = 3, strength: float = 1.0) -> FeatureHead:
    torch.manual_seed(0)
    head = FeatureHead(data.vectors.shape[1], num_classes, 16 if classifier == "mlp" else None)
    head.standardise(data.vectors)
    head.training_set = data
    fit(head, classifier, solver, strength)
    return head


def probabilities(head: FeatureHead, data: FeatureSet) -> torch.Tensor:
    with torch.no_grad():
        return head(data.vectors).softmax(dim=1)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("strength", [0.05, 1.0])
def test_logistic_regression_of_torch_is_that_of_scikit_learn(num_classes: int, strength: float) -> None:
    data = feature_set(num_classes)
    ours, theirs = (fitted(data, "linear", solver, num_classes, strength) for solver in ("torch", "sklearn"))
    assert torch.allclose(probabilities(ours, data), probabilities(theirs, data), atol=2e-3)


@pytest.mark.parametrize("classifier", ["linear", "svm", "mlp"])
@pytest.mark.parametrize("solver", ["torch", "sklearn"])
def test_every_classifier_separates_what_can_be_separated(classifier: str, solver: str) -> None:
    data = feature_set()
    right = probabilities(fitted(data, classifier, solver), data).argmax(dim=1) == data.labels[:, 0].long()
    assert right.float().mean() > 0.9


def test_linear_svms_agree_on_nearly_every_example() -> None:
    data = feature_set()
    ours, theirs = (probabilities(fitted(data, "svm", solver), data).argmax(dim=1) for solver in ("torch", "sklearn"))
    assert (ours == theirs).float().mean() > 0.97


def test_a_class_without_examples_never_wins() -> None:
    data = feature_set(2)
    assert probabilities(fitted(data, "linear", "sklearn", num_classes=4), data)[:, 2:].max() < 1e-6


def test_a_fit_is_the_same_bit_for_bit() -> None:
    data = feature_set()
    first, second = (fitted(data, "mlp", "torch").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ridge_regression_has_its_closed_form() -> None:
    single = feature_set()
    truth = single.vectors @ torch.linspace(-1, 1, 8)[:, None] / 50
    data = FeatureSet(single.vectors, truth, torch.ones(len(truth)), "regression")
    head = fitted(data, "linear", "torch", num_classes=1, strength=0.5)
    scaled = ((data.vectors - head.mean) / head.deviation).double()
    centred = truth.double() - truth.double().mean()
    weights = torch.linalg.solve(scaled.T @ scaled + torch.eye(8, dtype=torch.float64) / 0.5, scaled.T @ centred)
    assert torch.allclose(head.output.weight[0].double(), weights[:, 0], atol=1e-3)


def test_a_feature_that_never_varies_does_no_harm() -> None:
    data = feature_set()
    data.vectors[:, 3] = 7.0
    assert torch.isfinite(probabilities(fitted(data, "linear", "torch"), data)).all()


def test_a_missing_scikit_learn_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from ftcli.methods.feature_head import require_sklearn

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"ftcli\[sklearn\]"):
        require_sklearn()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"classifier": "svm", "solver": "steps"}, "`solver: steps` with `classifier: svm`"),
        ({"hidden": 8}, "`hidden` with `classifier: linear`"),
    ],
)
def test_options_of_another_choice_are_refused(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Features(**settings)


@pytest.mark.parametrize(("classifier", "solver", "task"), [("linear", "sklearn", "multi"), ("svm", "torch", "regression")])
def test_a_task_that_the_solver_does_not_know_is_refused(classifier: Any, solver: Any, task: Any) -> None:
    module = torch.nn.Module()
    module.add_module("score", FeatureHead(8, 3, None))
    data = feature_set()
    with pytest.raises(RequestError, match=f"cannot learn `task: {task}`"):
        Features(classifier=classifier, solver=solver).learn_from(module, FeatureSet(data.vectors, data.labels, data.weights, task))


# ---- runs --------------------------------------------------------------------------------------------------------------------


def recipe(folder: Path, name: str, method: dict[str, Any], **sections: Any) -> Path:
    document = {
        "version": 1,
        "name": name,
        "model": {"base": "builtin:tiny"},
        "data": {
            "train": [{"source": {"kind": "builtin", "name": "reviews"}, "limit": 60}],
            "evaluation": [{"name": "reviews", "source": {"kind": "builtin", "name": "reviews", "split": "test"}, "limit": 30}],
        },
        "method": {"kind": "features", **method},
        "objective": {"kind": "classification"},
        "train": {"steps": 3, "global_batch_size": 8},
        "output": str(folder / name),
        **sections,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(document))
    return path


def measured(folder: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last: dict[str, Any] = records[-1]["sources"]["reviews"]
    return last


def test_features_are_computed_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTCLI_CACHE", str(tmp_path / "cache"))
    calls: list[int] = []
    original = TreeModel.hidden_states

    def counted(self: TreeModel, batch: Any) -> Any:
        calls.append(len(batch.readout))
        return original(self, batch)

    monkeypatch.setattr(TreeModel, "hidden_states", counted)
    assert run(["train", str(recipe(tmp_path, "first", {}))]) == 0
    computed = sum(calls)
    assert computed >= 90
    calls.clear()
    assert run(["train", str(recipe(tmp_path, "second", {"classifier": "svm"}))]) == 0
    # the probes of a run compute, but not its 90 examples
    assert sum(calls) == computed - 90
    assert len(list((tmp_path / "cache").rglob("features-*.npy"))) == 2
    assert measured(tmp_path / "first")["accuracy"] > 0.7


def test_other_weights_have_other_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTCLI_CACHE", str(tmp_path / "cache"))
    for pooling in (None, "mean"):
        objective = {"kind": "classification", "pooling": pooling}
        assert run(["train", str(recipe(tmp_path, f"pooled-{pooling}", {}, objective=objective))]) == 0
    assert len(list((tmp_path / "cache").rglob("features-*.npy"))) == 4


def test_kept_features_are_what_the_whole_model_computes(tmp_path: Path) -> None:
    """The run proves it for a few examples; here the predictions of the saved classifier, by the model, equal those over features."""
    from ftcli.exporting.predict import predict_file

    assert run(["train", str(recipe(tmp_path, "run", {"classifier": "mlp", "hidden": 8}))]) == 0
    report = json.loads((tmp_path / "run" / "classification-reviews.json").read_text())
    from ftcli.data.sources.builtin import Builtin

    rows = [row for _, row in zip(range(30), (row for _, row in Builtin(name="reviews", split="test").rows()), strict=False)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = predict_file(str(tmp_path / "run"), tmp_path / "rows.jsonl")
    right = np.mean([prediction.label == row["label"] for prediction, row in zip(found, rows, strict=True)])
    assert right == pytest.approx(report["accuracy"])
    again = predict_file(str(tmp_path / "run"), tmp_path / "rows.jsonl")
    assert found == again


def test_what_is_saved_is_numbers_and_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(recipe(tmp_path, "run", {}))]) == 0
    folder = tmp_path / "run" / "adapter"
    tensors = load_file(folder / "feature_head.safetensors")
    assert set(tensors) == {"mean", "deviation", "output.weight", "output.bias"}
    assert json.loads((folder / "adapter_config.json").read_text())["labels"] == ["bad", "good", "mixed"]
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert run(["merge", str(tmp_path / "run")]) == 2
    assert "has no place" in capsys.readouterr().err


def test_updates_after_the_fit_are_taken_back_and_a_loop_by_steps_makes_them(tmp_path: Path) -> None:
    for name, method in {"fit": {}, "steps": {"solver": "steps"}}.items():
        for steps in (1, 3):
            path = recipe(tmp_path, f"{name}-{steps}", method, train={"steps": steps, "global_batch_size": 8, "lr": 0.1})
            assert run(["train", str(path)]) == 0
    weights = {
        name: load_file(tmp_path / name / "adapter" / "feature_head.safetensors") for name in ("fit-1", "fit-3", "steps-1", "steps-3")
    }
    assert all(torch.equal(weights["fit-1"][name], weights["fit-3"][name]) for name in weights["fit-1"])
    assert not torch.equal(weights["steps-1"]["output.weight"], weights["steps-3"]["output.weight"])


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "roberta"])
def test_encoders_give_features_too(architecture: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = {"init": {"architecture": architecture, "config": config}, "tokenizer": "builtin:tiny"}
    assert run(["train", str(recipe(tmp_path, "run", {}, model=model))]) == 0
    assert (tmp_path / "run" / "adapter" / "feature_head.safetensors").is_file()


def test_only_the_classifier_moves_and_nothing_of_the_base() -> None:
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    module = Features().attach(AutoModelForSequenceClassification.from_config(LlamaConfig(**sizes, num_labels=3)), AttachContext(seed=1))
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {"score.output.weight", "score.output.bias"}
    assert feature_head(module) is inner_model(module).score


def test_a_language_model_has_no_place_for_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, "run", {}, objective={"kind": "classification", "readout": "label-words"})
    assert run(["train", str(path)]) == 2
    assert "the objective has no classification head" in capsys.readouterr().err
