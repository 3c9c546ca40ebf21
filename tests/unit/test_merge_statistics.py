"""Statistics for fisher and regmean: what they are, and a merge that reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_chat_model import write_tiny_chat_model

from ftcli.cli.main import run as run_command
from ftcli.errors import UsageError
from ftcli.layout.model import TreeModel
from ftcli.merging.outcome import merge_models
from ftcli.merging.statistics import gather_statistics

ROWS = [{"prompt": "ab", "completion": "cde"}, {"prompt": "f", "completion": "gh"}, {"prompt": "xyz", "completion": "z"}]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FTCLI_CACHE", str(tmp_path / "cache"))
    write_tiny_chat_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "model"


def frame(folder: Path) -> tuple[torch.nn.Module, list[list[int]], list[int]]:
    """The model by transformers alone, each row's ids, and where its answer begins."""
    from transformers import AutoModelForCausalLM

    from ftcli.data.prepare import prepare
    from ftcli.data.settings import Data, EvaluationSource
    from ftcli.data.tree import target_weights
    from ftcli.models.tokenizer import load_tokenizer

    entry = EvaluationSource.model_validate({"source": {"kind": "file", "path": str(folder.parent / "rows.jsonl")}}, strict=False)
    settings = Data.model_construct(train=(), evaluation=(entry,), max_length=64)
    store = prepare(settings, load_tokenizer(str(folder)), cache_folder=folder.parent / "cache").evaluation[0]
    trees = [store.tree(index) for index in range(len(store))]
    ids = [tree.tokens.tolist() for tree in trees]
    starts = [int(np.flatnonzero(target_weights(tree, 0.0))[0]) for tree in trees]
    return AutoModelForCausalLM.from_pretrained(folder).float(), ids, starts


def test_fisher_is_the_sum_of_each_examples_squared_gradient(model: Path, tmp_path: Path) -> None:
    found = gather_statistics(str(model), tmp_path / "f.safetensors", "fisher", data=tmp_path / "rows.jsonl", max_length=64)
    assert found.num_examples == len(ROWS)
    stored = load_file(tmp_path / "f.safetensors")
    plain, rows, starts = frame(model)
    expected = {name: torch.zeros_like(parameter) for name, parameter in plain.named_parameters()}
    for ids, start in zip(rows, starts, strict=True):
        plain.zero_grad()
        logits = plain(torch.tensor([ids])).logits[0]
        targets = torch.tensor(ids[start:])
        (-torch.log_softmax(logits[start - 1 : -1], -1)[torch.arange(len(targets)), targets].sum()).backward()
        for name, parameter in plain.named_parameters():
            assert parameter.grad is not None
            expected[name] += parameter.grad**2
    assert stored.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(stored[name], value, rtol=1e-3, atol=1e-7)


def test_a_gram_matrix_is_that_of_the_layers_inputs(model: Path, tmp_path: Path) -> None:
    gather_statistics(str(model), tmp_path / "g.safetensors", "regmean", data=tmp_path / "rows.jsonl", max_length=64)
    stored = load_file(tmp_path / "g.safetensors")
    plain, rows, _ = frame(model)
    name = "model.layers.1.mlp.down_proj"
    seen: list[torch.Tensor] = []
    plain.get_submodule(name).register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1])))
    with torch.no_grad():
        for ids in rows:
            plain(torch.tensor([ids]))
    together = torch.cat(seen)
    torch.testing.assert_close(stored[f"{name}.weight"], together.T @ together, rtol=1e-4, atol=1e-6)
    assert all(value.shape[0] == value.shape[1] for value in stored.values())
    assert len(stored) == 2 * 7


def test_several_branches_and_their_padding_are_no_inputs(model: Path) -> None:
    """Rows of unlike lengths in one batch: the Gram matrix is that of the real tokens."""
    from ftcli.layout.batch import Batch
    from ftcli.merging.statistics import input_grams

    plain, rows, _ = frame(model)
    tree_model = TreeModel(plain, "rows")
    short, long = sorted(rows, key=len)[0], sorted(rows, key=len)[-1]

    def batch(of: list[list[int]]) -> Batch:
        width = max(map(len, of))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in of])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in of])
        positions = torch.arange(width).expand(len(of), -1)
        one = torch.zeros(1, dtype=torch.int64)
        return Batch(ids, positions, mask, None, one, one, torch.ones(1), one, one, one, sum(map(len, of)))

    together = input_grams(tree_model, iter([batch([short, long])]))
    apart = input_grams(tree_model, iter([batch([short]), batch([long])]))
    assert together.keys() == apart.keys()
    for name in together:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["fisher", "regmean"])
def test_a_merge_from_gathered_statistics_runs_end_to_end(model: Path, tmp_path: Path, kind: str) -> None:
    write_tiny_chat_model(tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    from safetensors.torch import save_file

    save_file({name: value + 0.01 for name, value in weights.items()}, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    for name in ("model", "other"):
        output = str(tmp_path / f"{name}.safetensors")
        command = ["merge-statistics", str(tmp_path / name), "--kind", kind, "--data", str(tmp_path / "rows.jsonl"), "-o", output]
        assert run_command([*command, "--examples", "2", "--max-length", "64"]) == 0
    models = [{"model": name, "statistics": f"{name}.safetensors"} for name in ("model", "other")]
    (tmp_path / "r.yaml").write_text(json.dumps({"merge_method": kind, "models": models}))
    assert run_command(["merge", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "merged")]) == 0
    first = load_file(tmp_path / "model" / "model.safetensors")
    for name, value in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert value.isfinite().all()
        assert (value - first[name]).abs().max() <= 0.0101 or kind == "regmean"


def test_fisher_weighs_tokens_of_unlike_vocabularies_by_their_own_statistics(tmp_path: Path) -> None:
    """Against sums over a dictionary of tokens; what a model has not counts nothing in it."""
    from tests.merge_models import LLAMA, llama_shapes, random_values, read_values, write_model, write_tensors

    words = {"a": [f"w{number}" for number in range(12)], "b": [*(f"w{number}" for number in reversed(range(3, 12))), "y0", "y1"]}
    values, squares = {}, {}
    for seed, (name, own) in enumerate(words.items()):
        config = {**LLAMA, "num_hidden_layers": 1, "vocab_size": len(own)}
        values[name] = random_values(llama_shapes(config), seed)
        squares[name] = {key: np.abs(value) + 0.1 for key, value in random_values(llama_shapes(config), seed + 2).items()}
        write_model(tmp_path / name, values[name], config, dtype="F32")
        document = {"model": {"type": "BPE", "vocab": {w: row for row, w in enumerate(own)}, "merges": []}, "added_tokens": []}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(document))
        write_tensors(tmp_path / f"{name}.safetensors", {key: ("F32", value) for key, value in squares[name].items()})
    models = [{"model": name, "statistics": f"{name}.safetensors", "parameters": {"weight": 0.5}} for name in words]
    recipe = {"merge_method": "fisher", "models": models, "tokenizer": {"source": "union", "pad_to_multiple_of": 8}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    merge_models(tmp_path / "r.yaml", tmp_path / "out", verify=False)
    ids = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    found = read_values(tmp_path / "out")
    assert len(ids) == 14
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for word, row in ids.items():
            parts = [
                (squares[model][name][own.index(word)], values[model][name][own.index(word)]) for model, own in words.items() if word in own
            ]
            expected = sum(share * value for share, value in parts) / sum(share for share, _ in parts)
            np.testing.assert_allclose(found[name][row], expected, rtol=1e-4, atol=1e-5)
        mean = (values["a"][name].mean(axis=0) + values["b"][name].mean(axis=0)) / 2
        np.testing.assert_allclose(found[name][len(ids) :], np.tile(mean, (2, 1)), atol=1e-5)


def test_a_file_that_is_there_and_a_kind_that_is_none_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").write_text("")
    with pytest.raises(UsageError, match="exists already"):
        gather_statistics(str(model), tmp_path / "there", "fisher", data=tmp_path / "rows.jsonl")
    assert run_command(["merge-statistics", str(model), "--kind", "fischer", "-o", "x", "--data", "y"]) == 2
    assert "did you mean `fisher`" in capsys.readouterr().err
