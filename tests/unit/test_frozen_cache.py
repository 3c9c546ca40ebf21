"""Hidden states of frozen lower layers, kept on disk: the same training without computing them again."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.laws.conftest import branching_tree, ragged_trees
from tests.laws.test_resume import assert_same, outcome
from tests.unit.test_subset_methods import BASES

from ftcli.cli.main import run
from ftcli.errors import RequestError
from ftcli.layout.batch import Batch, Origin
from ftcli.layout.boundary import Boundary, only_trees, tree_slots
from ftcli.layout.build import build_batch
from ftcli.layout.model import TreeModel
from ftcli.methods.parts import decoder_layers
from ftcli.models.load import load_model
from ftcli.models.settings import Init, Model
from ftcli.training import frozen_cache
from ftcli.training.frozen_cache import FOLDER, FrozenCache, proven_states

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


def recipe(folder: Path, name: str, cache: bool, *, save: int = 4, **train: Any) -> Path:
    """A small source that is seen four times, and some stories of which none is seen twice."""
    config = {**SIZES, **train.pop("config", {})}
    document = {
        "version": 1,
        "name": name,
        "model": {"init": {"architecture": train.pop("architecture", "llama"), "config": config}, "tokenizer": "builtin:tiny"},
        "data": {
            "train": [
                {"source": {"kind": "builtin", "name": "orders"}, "limit": 9},
                {"source": {"kind": "builtin", "name": "stories"}, "limit": 30, "weight": 0.1, "role": "replay"},
            ],
            "max_length": 256,
        },
        "method": {"kind": "freeze", "top_layers": 1, "cache_frozen": cache, **train.pop("method", {})},
        "train": {"epochs": 4, "global_batch_size": 3, "lr": 1e-2, "micro_batch_tokens": 300, **train},
        "every": {"log": 1, "save": save},
        "output": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(document))
    return path


class Killed(BaseException):
    """Nothing in the program expects it."""


def computed_tokens(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(computed, read) of every cache that is taken away."""
    seen: list[tuple[int, int]] = []
    original = FrozenCache.remove

    def remove(self: FrozenCache) -> None:
        seen.append((self.tokens_computed, self.tokens_read))
        original(self)

    monkeypatch.setattr(FrozenCache, "remove", remove)
    return seen


@pytest.mark.parametrize("layout", ["forest", "rows"])
def test_with_the_cache_the_same_is_learnt_and_lower_layers_run_once_an_example(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = computed_tokens(monkeypatch)
    assert run(["train", str(recipe(tmp_path, "with", True, layout=layout))]) == 0
    assert "keeps what the lowest 3 layers compute" in capsys.readouterr().out
    assert run(["train", str(recipe(tmp_path, "without", False, layout=layout))]) == 0
    found, expected = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("with", "without"))
    # Products of other shapes round otherwise; a wrong state would show at 1e-2, the size of the updates.
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-5
    manifest = json.loads((tmp_path / "with" / "manifest.json").read_text())
    last = json.loads((tmp_path / "with" / "metrics.jsonl").read_text().splitlines()[-1])
    (computed, read), orders = seen[0], manifest["data"][0]["num_tokens"]
    assert len(seen) == 1
    # The orders are seen four times and computed once; the stories, of which none is seen twice, are computed.
    assert read == 3 * orders
    assert computed + read == last["tokens"]
    assert manifest["frozen_cache"] == {
        "layers": 3,
        "bytes": manifest["frozen_cache"]["bytes"],
        "tokens_computed": computed,
        "tokens_read": read,
    }
    assert not (tmp_path / "with" / FOLDER).exists()


def test_with_the_same_batches_every_bit_is_the_same(tmp_path: Path) -> None:
    """One example a step is the same batch in every epoch; so the cache changes no bit, dropout above the boundary included."""
    for name, cache in (("with", True), ("without", False)):
        assert run(["train", str(recipe(tmp_path, name, cache, global_batch_size=1, steps=30, epochs=None))]) == 0
    assert_same(tmp_path / "with", tmp_path / "without")


def computed_trees(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[int, int]]]:
    """(step, tree) of everything that lower layers compute, in order."""
    seen: list[tuple[int, tuple[int, int]]] = []
    original = FrozenCache._compute

    def compute(self: FrozenCache, batch: Batch, trees: Any) -> list[torch.Tensor]:
        assert batch.origin is not None
        seen.extend((batch.origin.step, batch.origin.trees[i]) for i in trees)
        return original(self, batch, trees)

    monkeypatch.setattr(FrozenCache, "_compute", compute)
    return seen


def kill_in_the_middle_of_step_three(path: Path) -> None:
    """When the first of the step's trees is on the disk; the last checkpoint is of step 2."""
    original = FrozenCache._write
    written: list[int] = []

    def write(self: FrozenCache, source: int, tree: int, states: torch.Tensor, step: int) -> None:
        written.extend([step] if step == 3 else [])
        if len(written) == 2:
            raise Killed
        original(self, source, tree, states, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenCache, "_write", write)
        with pytest.raises(Killed):
            run(["train", str(path)])


@pytest.mark.parametrize("damage", [None, "states", "other weights"])
def test_a_resumed_run_computes_and_reads_what_the_uninterrupted_one_did(
    damage: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = computed_trees(monkeypatch)
    whole, parts = (recipe(tmp_path, name, True, save=2) for name in ("whole", "parts"))
    assert run(["train", str(whole)]) == 0
    expected = [*seen]
    kill_in_the_middle_of_step_three(parts)
    folder = tmp_path / "parts" / FOLDER
    if damage == "states":
        (folder / "hidden.bin").write_bytes(b"\x45" * (folder / "hidden.bin").stat().st_size)
    if damage == "other weights":
        (folder / "meta.json").write_text(json.dumps({"key": "of other weights"}))
    seen.clear()
    assert run(["train", str(parts), "--resume"]) == 0
    rest = [(step, tree) for step, tree in expected if step > 2]
    if damage is None:
        assert seen == rest
        assert_same(tmp_path / "parts", tmp_path / "whole")
        return
    assert len(seen) > len(rest)
    (found, _), (same, _) = outcome(tmp_path / "parts"), outcome(tmp_path / "whole")
    assert max(float((found[name] - same[name]).abs().max()) for name in same) < 1e-5


def test_an_interrupted_run_goes_on_with_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.training.hooks import Checkpoint

    seen = computed_tokens(monkeypatch)
    parts = recipe(tmp_path, "parts", True)
    original = Checkpoint.after_step

    def stopped(self: Checkpoint, progress: Any, batches: Any, result: Any) -> None:
        if progress.step == 6:
            self.stop.handle(signal.SIGTERM, None)
        original(self, progress, batches, result)

    monkeypatch.setattr(Checkpoint, "after_step", stopped)
    assert run(["train", str(parts)]) == 75
    monkeypatch.setattr(Checkpoint, "after_step", original)
    assert run(["train", str(parts), "--resume"]) == 0
    assert len(seen) == 1
    assert seen[0][1] > seen[0][0]  # without what the first part kept, a third


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"top_layers": 4}}, "the lowest layer trains"),
        ({"method": {"embeddings": True, "head": True}}, "model.embed_tokens trains below the layers"),
        ({"method": {"patterns": ["layers.0.mlp"]}}, "the lowest layer trains"),
        ({"config": {"attention_dropout": 0.1}}, "the frozen layers compute something else each time"),
        ({"compile": True}, "a compiled model has no layers"),
    ],
)
def test_what_cannot_be_kept_is_refused(changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, "refused", True, **changes)
    for command in ("check", "train"):
        assert run([command, str(path)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_a_cache_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(frozen_cache, "free_disk_bytes", lambda path: 1000)
    assert run(["train", str(recipe(tmp_path, "full", True))]) == 2
    assert "method.cache_frozen: the hidden states need" in capsys.readouterr().err
    assert not (tmp_path / "full").exists()


def test_nothing_is_kept_where_no_example_is_seen_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(recipe(tmp_path, "once", True, epochs=0.5))]) == 0
    assert "no example of this run is seen twice" in capsys.readouterr().out


# ---- the boundary --------------------------------------------------------------------------------------------------------------


def batch_of(layout: str, *trees: Any) -> Batch:
    return build_batch(layout, trees, [(np.arange(len(tree)) > 0).astype(np.float32) for tree in trees])


@pytest.mark.parametrize("layout", ["forest", "rows"])
def test_some_trees_of_a_batch_are_the_batch_of_these_trees(layout: str) -> None:
    trees = [*ragged_trees(4), *([branching_tree()] if layout == "forest" else []), *ragged_trees(6)[4:]]
    whole, chosen = batch_of(layout, *trees), [4, 1, 5]
    found, expected = only_trees(whole, chosen), batch_of(layout, *(trees[i] for i in chosen))
    assert torch.equal(found.input_ids * (1 if found.attention_mask is None else found.attention_mask), expected.input_ids)
    assert torch.equal(found.position_ids, expected.position_ids)
    if layout == "forest":
        assert found.forest is not None
        assert expected.forest is not None
        assert (found.forest.lengths, found.forest.ancestors) == (expected.forest.lengths, expected.forest.ancestors)
    else:
        assert torch.equal(found.attention_mask, expected.attention_mask)  # type: ignore[arg-type]
    lengths = [slots.stop - slots.start for slots in tree_slots(found)]
    assert lengths == [len(trees[i]) for i in chosen]


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "qwen2", "mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("layout", ["forest", "rows"])
def test_lower_and_upper_pass_are_the_whole_pass_and_each_leaves_the_other_part_alone(layout: str, name: str) -> None:
    architecture, sizes = BASES[name]
    model = load_model(Model(init=Init(architecture=architecture, config={"vocab_size": 97, **sizes}), tokenizer="builtin:tiny"), None)
    tree_model = TreeModel(model, layout).eval()
    layers = decoder_layers(model)[1]
    boundary = Boundary(layers, 3)
    ran: list[int] = []
    for number, layer in enumerate(layers):
        next(layer.children()).register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    proven_states(tree_model, boundary, ragged_trees(4))
    assert set(ran[:4]) == {0, 1, 2, 3}
    assert ran[4:] == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 0, 1, 2]  # lower, lower of others, upper, and twice lower for dropout
    boundary.remove()
    assert all("forward" not in vars(layer) for layer in layers)


@pytest.mark.parametrize("layout", ["forest", "rows"])
def test_what_is_kept_runs_the_upper_layers_alone(layout: str, tmp_path: Path) -> None:
    """A batch of which some trees are kept: the lower layers run for the others, and for none of them the second time."""
    model = load_model(Model(init=Init(architecture="llama", config={"vocab_size": 97, **SIZES}), tokenizer="builtin:tiny"), None)
    tree_model, trees, layers = TreeModel(model, layout), ragged_trees(5), decoder_layers(model)[1]
    boundary = Boundary(layers, 3)
    like = proven_states(tree_model, boundary, trees)
    cache = FrozenCache(tmp_path / "cache", boundary, tree_model, [np.array([len(tree) for tree in trees])], like, {})
    tokens: list[tuple[int, int]] = []
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda module, given, out, number=number: tokens.append((number, given[0].shape[:-1].numel())))
    first = replace(batch_of(layout, *trees[:2]), origin=Origin(1, ((0, 0), (0, 1))))
    whole = replace(batch_of(layout, *trees), origin=Origin(2, tuple((0, i) for i in range(5))))
    others, slots = batch_of(layout, *trees[2:]).input_ids.numel(), whole.input_ids.numel()
    expected = tree_model.hidden_states(whole)
    tree_model.lower_layers = cache
    tree_model.hidden_states(first)
    tokens.clear()
    once = tree_model.hidden_states(whole)
    assert tokens == [(0, others), (1, others), (2, others), (3, slots)]
    tokens.clear()
    again = tree_model.hidden_states(whole)
    assert tokens == [(3, slots)]
    filled = torch.cat([torch.arange(part.start, part.stop) for part in tree_slots(whole)])
    assert torch.equal(once[filled], again[filled])
    torch.testing.assert_close(again[filled], expected[filled], rtol=0, atol=1e-5)


def test_a_model_whose_upper_layers_see_more_is_refused() -> None:
    """Here the last layer reads what the first one left behind, as models that share keys and values do."""
    model = load_model(Model(init=Init(architecture="llama", config={"vocab_size": 97, **SIZES}), tokenizer="builtin:tiny"), None)
    layers, left = decoder_layers(model)[1], {}
    layers[0].mlp.register_forward_hook(lambda module, arguments, output: left.update(mean=output.mean()))
    layers[3].mlp.register_forward_hook(lambda module, arguments, output: output + left.pop("mean", 0.0))
    with pytest.raises(RequestError, match="the upper layers of this model see more of the lower ones"):
        proven_states(TreeModel(model, "forest"), Boundary(layers, 2), ragged_trees(3))
