"""`ftcli export --to gptq`: weights rounded by what they do, stored as the libraries that run them read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ftcli.errors import GateError, MissingExtraError, RequestError, UsageError
from ftcli.exporting.calibration import decoder_layers, layer_by_layer
from ftcli.exporting.export import ExportReport, export
from ftcli.exporting.formats import gptq as gptq_format
from ftcli.exporting.formats.gptq import Gptq, packed
from ftcli.exporting.formats.hf import Hf
from ftcli.exporting.gptq import Rounded, output_error, rounded, rounded_to_nearest
from ftcli.models.load import load_model, save_model
from ftcli.models.settings import Init, Model
from ftcli.models.tokenizer import Tokenizer

CONFIG = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "initializer_range": 0.2, "max_position_embeddings": 512,
}  # fmt: skip
GEMMA = {**CONFIG, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4}


@pytest.fixture
def make_model(make_tokenizer: Callable[..., Tokenizer], tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a tiny model."""

    def make(architecture: str = "llama", config: dict[str, Any] = CONFIG, dtype: torch.dtype = torch.float32) -> Path:
        tokenizer = make_tokenizer()
        model = load_model(Model(init=Init(architecture=architecture, config=config)), tokenizer, seed=1)
        save_model(model.to(dtype), tokenizer, tmp_path / "model")
        return tmp_path / "model"

    return make


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of texts."""
    texts = [f"Once upon a time there were {number} little foxes who lived by the sea, and a clockmaker." for number in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def correlated(seed: int, num_rows: int = 24, length: int = 64) -> tuple[Tensor, Tensor]:
    """(a weight, the gram of inputs that go together, some much larger than others)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(512, length, generator=generator) @ torch.randn(length, length, generator=generator)
    inputs *= torch.rand(length, generator=generator).exp() ** 2
    return torch.randn(num_rows, length, generator=generator), inputs.T @ inputs


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_nearest() -> None:
    weight, _ = correlated(0)
    for bits in (4, 8):
        found, plain = (rounded(weight, torch.eye(64), bits, 32, torch.float32), rounded_to_nearest(weight, bits, 32, torch.float32))
        assert torch.equal(found.integers, plain.integers)
        assert torch.equal(found.scales, plain.scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_outputs_change_much_less_than_by_rounding_to_nearest(bits: int, seed: int) -> None:
    weight, gram = correlated(seed, length=192)  # more columns than are rounded at once
    found, plain = rounded(weight, gram, bits, 64, torch.float32), rounded_to_nearest(weight, bits, 64, torch.float32)
    assert output_error(weight, found.weight(), gram) < 0.3 * output_error(weight, plain.weight(), gram)


def test_the_rounding_does_not_depend_on_how_many_columns_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = correlated(3, length=192)
    first = rounded(weight.double().float(), gram, 4, 64, torch.float32)
    monkeypatch.setattr("ftcli.exporting.gptq._COLUMNS", 7)
    second = rounded(weight, gram, 4, 64, torch.float32)
    assert (first.integers != second.integers).float().mean() < 0.01  # sums in another order, near ties


def test_inputs_that_never_came_change_nothing_else() -> None:
    weight, gram = correlated(4)
    gram[10], gram[:, 10] = 0.0, 0.0
    found = rounded(weight, gram, 4, 32, torch.float32)
    assert found.weight().isfinite().all()
    assert float((found.weight()[:, 10] - weight[:, 10]).abs().max()) <= float(found.scales[:, 0].max()) * 1.01
    assert torch.equal(rounded(torch.zeros(4, 32), torch.zeros(32, 32), 4, 32, torch.float16).weight(), torch.zeros(4, 32).half())


def test_what_is_packed_can_be_counted_by_hand() -> None:
    layer = Rounded(torch.tensor([[-8, -7, 0, 1, 2, 3, 6, 7]], dtype=torch.int8), torch.ones(1, 1))
    assert packed(layer, 4)["weight_packed"].tolist() == [[0xFEBA9810 - 2**32]]
    layer = Rounded(torch.tensor([[-128, 0, 1, 127]], dtype=torch.int8), torch.ones(1, 1))
    assert packed(layer, 8)["weight_packed"].tolist() == [[0xFF818000 - 2**32]]


@pytest.mark.parametrize(
    ("architecture", "config"),
    [("llama", CONFIG), ("qwen3", CONFIG), ("gemma3_text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]})],
)
def test_a_layer_sees_what_it_sees_in_the_whole_model(architecture: str, config: dict[str, Any], make_model: Any) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(make_model(architecture, config))
    rows = [[5, 9, 3, 7, 2, 11, 4, 8], [4, 4, 6]]
    expected: dict[str, Tensor] = {}

    def add(name: str) -> Any:
        def hook(layer: Any, inputs: Any) -> None:
            seen = inputs[0].flatten(0, -2)
            expected[name] = expected.get(name, 0) + seen.T @ seen

        return hook

    stack_name, stack = decoder_layers(model)
    hooks = [
        module.register_forward_pre_hook(add(f"{stack_name}.{name}"))
        for name, module in stack.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    found: dict[str, Tensor] = {}
    layer_by_layer(model, rows, lambda name, layer, grams: found.update({f"{name}.{part}": gram for part, gram in grams.items()}))
    assert found.keys() == expected.keys()
    for name, gram in expected.items():
        torch.testing.assert_close(found[name], gram, rtol=1e-4, atol=1e-4)


def test_the_next_layer_sees_what_changed_layers_make(make_model: Any) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(make_model())
    seen: dict[bool, Tensor] = {}
    for is_changed in (False, True):

        def change(name: str, layer: Any, grams: dict[str, Tensor], is_changed: bool = is_changed) -> None:
            if name.endswith(".0") and is_changed:
                layer.mlp.down_proj.weight.data.zero_()
            elif name.endswith(".1"):
                seen[is_changed] = grams["self_attn.q_proj"]

        layer_by_layer(model, [[5, 9, 3, 7]], change)
    assert not torch.allclose(seen[False], seen[True])


def exported(folder: Path, rows: Path | None, dtype: str = "auto") -> ExportReport:
    pytest.importorskip("compressed_tensors", reason="the extra `gptq` is not installed")
    return export([str(folder)], Gptq(dtype, data=rows), folder.parent / "out")


@pytest.mark.parametrize(("architecture", "dtype"), [("llama", torch.float32), ("llama", torch.bfloat16), ("qwen2", torch.float16)])
def test_transformers_computes_with_the_very_weights_that_were_chosen(
    architecture: str, dtype: torch.dtype, make_model: Any, rows: Path
) -> None:
    report = exported(make_model(architecture, CONFIG, dtype), rows)
    check = next(check for check in report.checks if "transformers" in check.name)
    assert check.passed
    assert check.difference is not None
    assert 0 < check.difference.kl < 0.3
    assert "14 linear layers in groups of 32" in check.detail
    config = json.loads((Path(report.output) / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    told = json.loads((Path(report.output) / "gptq.json").read_text())["layers"]
    assert all(entry["output_error"] < entry["output_error_rounded_to_nearest"] for entry in told.values())


def test_eight_bits_are_nearer_than_four(make_model: Any, rows: Path) -> None:
    folder = make_model()
    near = exported(folder, rows, "int8").checks[1].difference
    assert near is not None
    assert near.kl < 1e-3


def test_rows_that_are_no_whole_groups_stay_and_are_not_claimed(make_model: Any, rows: Path) -> None:
    report = exported(make_model("llama", {**CONFIG, "intermediate_size": 100}), rows)
    config = json.loads((Path(report.output) / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    assert "12 linear layers in groups of 64" in report.checks[1].detail


def test_weights_that_are_packed_wrongly_are_found(make_model: Any, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model()
    monkeypatch.setattr(gptq_format, "packed", lambda layer, bits: packed(Rounded(layer.integers.roll(1, 1), layer.scales), bits))
    with pytest.raises(GateError, match="tensors that differ"):
        exported(folder, rows)
    assert not (folder.parent / "out").exists()


def test_what_cannot_be_rounded_is_refused_before_anything_is_read(
    make_model: Any, rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, out = make_model(), tmp_path / "out"
    with pytest.raises(UsageError, match="`hf` reads no data"):
        Hf(data=rows)
    monkeypatch.setattr(gptq_format, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError):
        export([str(folder)], Gptq(data=rows), out)
    monkeypatch.setattr(gptq_format, "find_spec", lambda name: object())
    with pytest.raises(RequestError, match="is no run that has data"):
        export([str(folder)], Gptq(), out)
    gpt2 = make_model("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64})
    with pytest.raises(RequestError, match="GPT-2 has no linear layers"):
        export([str(gpt2)], Gptq(data=rows), out)
    assert not out.exists()
