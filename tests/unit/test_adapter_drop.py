"""AdapterDrop: lower layers without adapters in training, in a saved adapter, and in the report of speed against quality."""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcli.cli.main import run
from ftcli.errors import RequestError
from ftcli.methods.bottleneck.drop import skip_first, without_first
from ftcli.methods.bottleneck.files import load_adapter, read_adapter, write_adapter
from ftcli.methods.bottleneck.layer import bottleneck_layers
from ftcli.methods.bottleneck_adapter import BottleneckAdapter, FixedDrop, RandomDrop
from ftcli.methods.context import AttachContext
from ftcli.models.load import load_model
from ftcli.models.settings import Init, Model

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
IDS = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(1))


@cache
def kept_base() -> Any:
    config = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, **LLAMA}
    return load_model(Model(init=Init(architecture="llama", config=config)), None, seed=3).eval()


def attached(method: BottleneckAdapter) -> Any:
    module: Any = method.attach(copy.deepcopy(kept_base()), AttachContext(seed=5)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    found: torch.Tensor = module(IDS, use_cache=False).logits
    return found


def dropped(method: BottleneckAdapter, module: Any, step: int, seed: int = 0) -> list[int]:
    """Layers whose adapters the step trains without."""
    method.before_step(module, step, 100, seed)
    return sorted({layer.place.layer for _, layer in bottleneck_layers(module) if layer.is_dropped})


def test_fixed_drop_gives_the_first_layers_no_adapter_at_all() -> None:
    module = attached(BottleneckAdapter(drop=FixedDrop(layers=2), leave_out=(3,)))
    assert [layer.place.layer for _, layer in bottleneck_layers(module)] == [2, 2]


def test_fixed_drop_of_nothing_is_nothing() -> None:
    assert BottleneckAdapter(drop=FixedDrop(layers=0)).peft_config() == BottleneckAdapter().peft_config()


def test_random_drop_takes_every_number_of_first_layers_but_all() -> None:
    method = BottleneckAdapter(drop=RandomDrop())
    module = attached(method)
    seen = [dropped(method, module, step) for step in range(1, 200)]
    assert all(layers == list(range(len(layers))) for layers in seen)
    counts = [sum(len(layers) == n for layers in seen) for n in range(5)]
    assert counts[4] == 0
    assert all(30 < count < 70 for count in counts[:4])


def test_random_drop_has_a_largest_number_and_always_leaves_an_adapter() -> None:
    limited, upper = BottleneckAdapter(drop=RandomDrop(layers=1)), BottleneckAdapter(drop=RandomDrop(), leave_out=(2, 3))
    first, second = attached(limited), attached(upper)
    assert {len(dropped(limited, first, step)) for step in range(1, 40)} == {0, 1}
    assert {len(dropped(upper, second, step)) for step in range(1, 40)} == {0, 1}


def test_random_drop_depends_on_seed_and_step_alone() -> None:
    method = BottleneckAdapter(drop=RandomDrop())
    module, other = attached(method), attached(method)
    expected = [dropped(method, module, step, seed=3) for step in range(1, 30)]
    assert [dropped(method, other, step, seed=3) for step in range(29, 0, -1)] == expected[::-1]
    assert [dropped(method, other, step, seed=4) for step in range(1, 30)] != expected


def test_a_dropped_layer_computes_as_the_base_in_training_and_gets_no_gradient() -> None:
    method = BottleneckAdapter(drop=RandomDrop())
    module = attached(method)
    step = next(step for step in range(1, 50) if dropped(method, module, step) == [0, 1])
    whole = logits(module)
    skip_first(module, 2)
    expected = logits(module)
    skip_first(module, 0)
    method.before_step(module, step, 100, 0)
    adapters = [(layer.place.layer, p) for _, layer in bottleneck_layers(module) for p in layer.bottleneck_adapters.parameters()]
    resting = {index for index, parameter in adapters if not parameter.requires_grad}
    assert resting == {0, 1}
    assert torch.equal(logits(module.train()), expected)
    assert torch.equal(logits(module.eval()), whole)
    module.train()(IDS, labels=IDS, use_cache=False).loss.backward()
    with_gradient = {layer.place.layer for _, layer in bottleneck_layers(module) for p in layer.parameters() if p.grad is not None}
    assert with_gradient == {2, 3}
    names = {name for group in method.parameter_groups(module, 1e-3, 0.0) for name in group["names"]}
    assert len(names) == 4 * 2 * 4


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_saved_adapter_without_its_first_layers_computes_as_if_they_were_skipped(count: int, tmp_path: Path) -> None:
    method = BottleneckAdapter()
    module = attached(method)
    method.save(module, tmp_path / "whole")
    config, tensors = without_first(*read_adapter(tmp_path / "whole"), count)
    write_adapter(tmp_path / "cut", config, tensors)
    cut = load_adapter(copy.deepcopy(kept_base()), tmp_path / "cut")
    skip_first(module, count)
    assert torch.equal(logits(cut), logits(module))
    assert len(list(bottleneck_layers(cut))) == 2 * (4 - count)
    assert len(tensors) == 8 * (4 - count)


def test_dropping_every_layer_is_refused(tmp_path: Path) -> None:
    BottleneckAdapter().save(attached(BottleneckAdapter()), tmp_path)
    with pytest.raises(RequestError, match="4 drops every adapter"):
        without_first(*read_adapter(tmp_path), 4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with an adapter on the embedded model."""
    folder = tmp_path_factory.mktemp("drop")
    document = {
        "version": 1,
        "name": "dropping",
        "model": {"base": "builtin:tiny"},
        "data": {
            "train": [{"source": {"kind": "builtin", "name": "orders"}, "limit": 12}],
            "evaluation": [{"name": "orders", "source": {"kind": "builtin", "name": "orders", "split": "test"}, "limit": 3}],
            "max_length": 512,
        },
        "method": {"kind": "adapter", "drop": {"kind": "random"}},
        "train": {"steps": 6, "global_batch_size": 4},
        "every": {"log": 1},
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(document))
    assert run(["train", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


def test_the_report_measures_every_number_of_layers(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["adapter-drop", str(finished), "--report", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    manifest = json.loads((finished / "manifest.json").read_text())
    rows = report["rows"]
    assert [row["layers"] for row in rows] == list(range(len(rows)))
    assert rows[0]["relative_time"] == 1.0
    assert all(0.2 < row["relative_time"] < 3 for row in rows)
    # With nothing dropped it is the run's own result, with everything dropped the untuned base.
    assert rows[0]["losses"]["orders"] == pytest.approx(manifest["summary"]["after"]["orders"]["loss"], rel=1e-5)
    assert rows[-1]["losses"]["orders"] == pytest.approx(manifest["summary"]["before"]["orders"]["loss"], rel=1e-5)
    assert json.loads((finished / "adapter-drop.json").read_text()) == report
    assert (finished / "adapter-drop.svg").read_text().lstrip().startswith("<?xml")


def test_the_command_writes_an_adapter_that_answers(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["adapter-drop", str(finished), "--layers", "2", "-o", str(tmp_path / "cut")]) == 0
    config, tensors = read_adapter(tmp_path / "cut")
    whole = read_adapter(finished / "adapter")[1]
    assert config["leave_out"] == [0, 1]
    assert tensors.keys() < whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors.items())
    capsys.readouterr()
    assert run(["generate", str(tmp_path / "cut"), "Once upon a time", "--max-new-tokens", "3"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither --layers nor --report"),
        (["--layers", "1"], "--layers needs --output"),
        (["--layers", "99", "-o", "cut"], "99 drops every adapter"),
        (["--layers", "-1", "-o", "cut"], "invalid value for `--layers`"),
        (["--report", "--layers", "1"], "either --layers or --report"),
    ],
)
def test_requests_that_say_too_little_or_too_much(
    arguments: list[str], message: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["adapter-drop", str(finished), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()


def test_a_folder_that_is_no_run_and_a_run_without_bottlenecks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["adapter-drop", str(tmp_path), "--report"]) == 2
    assert "is no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (BottleneckAdapter(drop=FixedDrop(layers=99)), "method.drop.layers: found 99, allowed: at most 3"),
        (BottleneckAdapter(drop=RandomDrop(layers=4)), "method.drop.layers: found 4, allowed: at most 3"),
        (BottleneckAdapter(drop=RandomDrop(), leave_out=(0, 1, 2)), "drops no adapter: those that are there are in layers 3"),
        (BottleneckAdapter(drop=RandomDrop(layers=1), leave_out=(0,)), "drops no adapter: those that are there are in layers 1, 2, 3"),
    ],
)
def test_a_drop_that_drops_nothing_or_everything_is_refused(method: BottleneckAdapter, words: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words)):
        attached(method)
