"""Laws 1, 2, 3, 6 for classification: the update does not depend on the cut or the layout and is that of the model's own forward pass
over single examples; a resumed run equals an uninterrupted one; what is saved is what other tools compute with.

SGD without clipping is the instrument, in float64.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
)

from ftcli.cli.main import run
from ftcli.data.tree import SPAN, TokenTree, path_tree
from ftcli.layout.build import build_posed
from ftcli.layout.model import TreeModel
from ftcli.layout.probe import choose_layout
from ftcli.layout.readout import pooled
from ftcli.methods.full import Full
from ftcli.models.classifier import POOLING_FIELD
from ftcli.objectives.classification import Classification
from ftcli.objectives.label_words import LabelWords
from ftcli.optim.optimizers.sgd import SGD
from ftcli.training.batches import BatchSource
from ftcli.training.step import Learner, optimizer_step
from tests.laws.conftest import VOCABULARY, make_llama
from tests.laws.test_update import ListStore, OneStep, largest_difference

LR = 0.5
TOLERANCE = 1e-7
LABELS = ("a", "b", "c")
WORDS = LabelWords(((5, 6), (5, 7, 8), (9,)))
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODERS = {
    "bert": BertConfig(**SMALL),
    "roberta": RobertaConfig(**SMALL, pad_token_id=1),
    "deberta": DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_hidden_size=32),
    "modernbert": ModernBertConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
}
TASKS: dict[str, dict[str, Any]] = {
    "single": {},
    "balanced": {"class_weights": {"a": 3.0, "b": 1.0, "c": 0.25}},
    "multi": {"task": "multi"},
    "regression": {"task": "regression"},
}


def make_classifier(config: Any, num_labels: int = 3, **changes: Any) -> Any:
    torch.manual_seed(0)
    for name, value in {"num_labels": num_labels, "pad_token_id": 0, **changes}.items():
        setattr(config, name, value)
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa" if changes else None).double()


def llama(num_labels: int = 3, **changes: Any) -> Any:
    return make_classifier(LlamaConfig(**SMALL, num_key_value_heads=2), num_labels, **changes)


def labelled_trees(labels: list[tuple[str, ...]], weights: tuple[float, ...] = (1.0, 0.25, 2.0)) -> list[TokenTree]:
    """Texts of very different lengths and weights; no token is the padding of the tiny models."""
    generator = np.random.default_rng(3)
    trees = []
    for index, given in enumerate(labels):
        length = int(generator.integers(2, 40))
        spans = np.array([(0, length, weights[index % len(weights)], True)], dtype=SPAN)
        tree = path_tree(generator.integers(10, VOCABULARY, length).astype(np.int32), spans, 0, index)
        trees.append(TokenTree(tree.tokens, tree.starts, tree.parents, spans, 0, index, given))
    return trees


def labels_for(task: str) -> list[tuple[str, ...]]:
    if task == "regression":
        return [("0.5",), ("-1",), ("2.25",), ("3",), ("0",), ("1e-1",), ("7",)]
    if task == "multi":
        return [("a",), (), ("a", "c"), ("b",), ("c", "b", "a"), ("c",), ()]
    return [("a",), ("c",), ("b",), ("a",), ("a",), ("c",), ("b",)]


def objective_of(**settings: Any) -> Classification:
    objective = Classification(**settings) if settings.get("task") == "regression" else Classification(labels=LABELS, **settings)
    if isinstance(objective.class_weights, dict):
        objective._weights = tuple(objective.class_weights.values())
    if objective.readout == "label-words":
        objective._words = WORDS
    return objective


def updated(model: Any, objective: Classification, trees: list[TokenTree], layout: str, budget: int) -> dict[str, torch.Tensor]:
    """Parameters after one SGD step."""
    accelerator = Accelerator(cpu=True)
    groups = [{"params": list(model.parameters()), "names": [name for name, _ in model.named_parameters()]}]
    prepared, optimizer = accelerator.prepare(TreeModel(model, layout), SGD().build(groups, LR))
    learner = Learner(accelerator, prepared, optimizer, objective, Full(), 1, None, 17, 1)
    source = BatchSource([ListStore(trees)], OneStep(len(trees)), objective, layout, budget, 1, 0, 0)
    prepared.eval()  # the heads of encoders have dropout
    optimizer_step(learner, source.at(1), 1.0)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def stepped(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    return {name: (p if p.grad is None else p - LR * p.grad).detach() for name, p in model.named_parameters()}


def head_reference(model: Any, objective: Classification, trees: list[TokenTree]) -> dict[str, torch.Tensor]:
    """The same step from the model's own forward pass over every text alone, with torch's losses."""
    model.eval()
    loss, total = torch.zeros((), dtype=torch.float64), 0.0
    for tree in trees:
        logits = model(input_ids=torch.from_numpy(tree.tokens.astype(np.int64))[None]).logits
        weight = float(tree.spans["weight"][0])
        assert tree.labels is not None
        if objective.task == "regression":
            own = (logits[0, 0] - float(np.float32(tree.labels[0]))) ** 2
        elif objective.task == "multi":
            truth = torch.tensor([[float(label in tree.labels) for label in LABELS]], dtype=torch.float64)
            own = functional.binary_cross_entropy_with_logits(logits, truth)
        else:
            index = LABELS.index(tree.labels[0])
            weight *= 1.0 if objective._weights is None else objective._weights[index]
            own = functional.cross_entropy(logits, torch.tensor([index]))
        loss, total = loss + weight * own, total + weight
    return stepped(model, loss / total)


@pytest.mark.parametrize("layout", ["forest", "rows"])
@pytest.mark.parametrize("budget", [1, 37, 10_000])
@pytest.mark.parametrize("task", TASKS)
def test_a_step_with_a_head_is_that_of_single_texts_however_it_is_cut(task: str, budget: int, layout: str) -> None:
    objective, num_labels = objective_of(**TASKS[task]), 1 if task == "regression" else 3
    trees = labelled_trees(labels_for(task))
    expected = head_reference(llama(num_labels), objective, trees)
    assert largest_difference(updated(llama(num_labels), objective, trees, layout, budget), expected) < TOLERANCE


@pytest.mark.parametrize("budget", [1, 10_000])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_step_of_an_encoder_is_that_of_single_texts_however_it_is_cut(name: str, budget: int) -> None:
    objective, trees = objective_of(), labelled_trees(labels_for("single"))
    expected = head_reference(make_classifier(ENCODERS[name]), objective, trees)
    assert largest_difference(updated(make_classifier(ENCODERS[name]), objective, trees, "rows", budget), expected) < TOLERANCE


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_gets_rows_and_the_probe_agrees_with_its_own_forward_pass(name: str) -> None:
    model = TreeModel(make_classifier(ENCODERS[name]).float()).eval()
    choice = choose_layout(model, labelled_trees(labels_for("single")), "auto", frozenset({"forest", "rows"}), 64)
    assert choice.layout == "rows"


def test_a_decoder_gets_the_forest_even_where_a_text_ends_with_padding() -> None:
    model = TreeModel(llama(pad_token_id=VOCABULARY - 1).float()).eval()
    trees = labelled_trees(labels_for("single"))
    trees[0].tokens[-1] = VOCABULARY - 1
    assert choose_layout(model, trees, "auto", frozenset({"forest", "rows"}), 64).layout == "forest"


def words_reference(objective: Classification, trees: list[TokenTree]) -> dict[str, torch.Tensor]:
    """The same step from one ordinary forward pass for each text and label."""
    model = make_llama()
    loss, total = torch.zeros((), dtype=torch.float64), 0.0
    for tree in trees:
        scores = []
        for word in WORDS.ids:
            tokens = torch.tensor([*tree.tokens.tolist(), *word])
            log_probs = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[-len(word) :]
            scores.append(log_probs.mean() if objective.length_normalised else log_probs.sum())
        assert tree.labels is not None
        weight = float(tree.spans["weight"][0])
        own = functional.cross_entropy(torch.stack(scores)[None], torch.tensor([LABELS.index(tree.labels[0])]))
        loss, total = loss + weight * own, total + weight
    return stepped(model, loss / total)


@pytest.mark.parametrize("layout", ["forest", "rows"])
@pytest.mark.parametrize("budget", [1, 60, 10_000])
@pytest.mark.parametrize("length_normalised", [False, True])
def test_a_step_with_label_words_is_that_of_one_pass_for_each_label(length_normalised: bool, budget: int, layout: str) -> None:
    objective = objective_of(readout="label-words", length_normalised=length_normalised)
    trees = labelled_trees(labels_for("single"))
    found = updated(make_llama(), objective, trees, layout, budget)
    assert largest_difference(found, words_reference(objective, trees)) < TOLERANCE


@pytest.mark.parametrize("pooling", ["last", "first", "mean"])
def test_pooling_is_that_of_each_branch_alone_in_both_layouts(pooling: str) -> None:
    objective = objective_of(readout="label-words")
    trees = labelled_trees(labels_for("single"))
    model = TreeModel(make_llama(), "forest").eval()
    with torch.no_grad():
        expected = []
        for tree in trees:
            for word in WORDS.ids:
                tokens = torch.tensor([*tree.tokens.tolist(), *word])
                alone = make_llama().base_model(input_ids=tokens[None]).last_hidden_state[0]
                expected.append({"last": alone[-1], "first": alone[0], "mean": alone.mean(dim=0)}[pooling])
        for layout in ("forest", "rows"):
            model.use_layout(layout)
            batch = build_posed(layout, [objective.pose(tree) for tree in trees])
            found = pooled(model.hidden_states(batch), batch, pooling)
            assert torch.allclose(found, torch.stack(expected), atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "bert", "roberta", "deberta"])
def test_mean_pooling_reads_the_mean_of_all_tokens(name: str) -> None:
    """A head that reads the mean gives the same logits to a text and to the same text padded, and others than without it."""
    config = LlamaConfig(**SMALL, num_key_value_heads=2) if name == "llama" else ENCODERS[name]
    plain = TreeModel(make_classifier(config)).eval()
    model = TreeModel(make_classifier(config)).eval()
    setattr(model.module.config, POOLING_FIELD, "mean")
    try:
        trees, objective = labelled_trees(labels_for("single")), objective_of()
        batch = build_posed("rows", [objective.pose(tree) for tree in trees])
        with torch.no_grad():
            alone = torch.cat([model(build_posed("rows", [objective.pose(tree)])) for tree in trees])
            assert torch.allclose(model(batch), alone, atol=TOLERANCE)
            states = [model.module.base_model(torch.from_numpy(tree.tokens.astype(np.int64))[None]).last_hidden_state for tree in trees]
            means = torch.stack([state[0].mean(dim=0) for state in states])
            if name == "llama":
                assert torch.allclose(alone, model.module.score(means), atol=TOLERANCE)
            elif name == "bert":
                assert torch.allclose(alone, model.module.classifier(model.module.bert.pooler(means[:, None])), atol=TOLERANCE)
    finally:
        delattr(model.module.config, POOLING_FIELD)
    with torch.no_grad():
        assert not torch.allclose(plain(batch), alone, atol=1e-3)


# ---- runs ------------------------------------------------------------------------------------------------------------------


def recipe(folder: Path, name: str, method: dict[str, Any], **objective: Any) -> Path:
    prompt = {"kind": "label", "template": "Review: {text}\nOpinion:"}
    document = {
        "version": 1,
        "name": name,
        "model": {"base": "builtin:tiny"},
        "data": {
            "train": [{"source": {"kind": "builtin", "name": "reviews"}, "format": prompt, "limit": 24}],
            "evaluation": [{"source": {"kind": "builtin", "name": "reviews", "split": "test"}, "format": prompt, "limit": 12}],
        },
        "method": method,
        "objective": {"kind": "classification", **objective},
        "train": {"epochs": 2, "global_batch_size": 5},
        "every": {"log": 1, "evaluate": 4, "save": 3},
        "output": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(document))
    return path


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "head": ({"kind": "head"}, {}),
    "features": ({"kind": "features"}, {}),
    "features by steps": ({"kind": "features", "solver": "steps", "classifier": "mlp"}, {}),
    "lora": ({"kind": "lora", "rank": 4, "dropout": 0.1}, {"class_weights": "balanced"}),
    "label words": ({"kind": "lora", "rank": 4}, {"readout": "label-words"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_classifier_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Stops right after the fit of `features`, and right before a save."""
    from ftcli.training.hooks import Checkpoint

    method, objective = RUNS[name]
    whole, parts = recipe(tmp_path, "whole", method, **objective), recipe(tmp_path, "parts", method, **objective)
    assert run(["train", str(whole)]) == 0
    original = Checkpoint.after_step
    for stop_after in (1, 5):

        def after_step(self: Checkpoint, progress: Any, batches: Any, result: Any, stop_after: int = stop_after) -> None:
            if progress.step == stop_after:
                self.stop.handle(signal.SIGTERM, None)
            original(self, progress, batches, result)

        monkeypatch.setattr(Checkpoint, "after_step", after_step)
        assert run(["train", str(parts), "--resume"]) == 75
    monkeypatch.setattr(Checkpoint, "after_step", original)
    assert run(["train", str(parts), "--resume"]) == 0
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def outcome(folder: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The bits of everything that was saved, and the metrics without their times."""
    files = sorted(path for kind in ("model", "adapter") for path in (folder / kind).glob("*.safetensors"))
    assert files
    weights = {name: tensor.numpy().tobytes() for path in files for name, tensor in load_file(path).items()}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = {"seconds", "target_tokens_per_second", "memory_bytes"}
    return weights, [{key: value for key, value in record.items() if key not in times} for record in records]
