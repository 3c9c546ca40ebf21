"""`ftcli export --to onnx`: onnxruntime gives the same logits, for any length, padded or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftcli.errors import GateError
from ftcli.exporting.export import export
from ftcli.exporting.formats import onnx as onnx_format
from ftcli.exporting.formats.onnx import Onnx
from ftcli.models.load import load_model, save_model
from ftcli.models.settings import Init, Model
from ftcli.models.tokenizer import Tokenizer

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="the extra `onnx` is not installed")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1, "initializer_range": 0.2}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 512, "initializer_range": 0.2}


@pytest.fixture
def make_model(make_tokenizer: Callable[..., Tokenizer], tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a tiny model."""

    def make(architecture: str, config: dict[str, Any]) -> Path:
        tokenizer = make_tokenizer()
        save_model(load_model(Model(init=Init(architecture=architecture, config=config)), tokenizer, seed=1), tokenizer, tmp_path / "model")
        return tmp_path / "model"

    return make


@pytest.mark.parametrize(("architecture", "config"), [("llama", SIZES), ("gpt2", GPT2)])
def test_the_graph_gives_the_same_logits(architecture: str, config: dict[str, Any], make_model: Any, tmp_path: Path) -> None:
    report = export([str(make_model(architecture, config))], Onnx(), tmp_path / "out")
    assert [check.passed for check in report.checks] == [True, True, True]
    assert all(check.difference is not None and check.difference.kl < 1e-8 for check in report.checks)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.onnx", "tokenizer.json", "config.json", "manifest.json", "README.md"} <= files


def test_large_weights_go_into_a_file_of_their_own(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_format, "EXTERNAL_BYTES", 1000)
    report = export([str(make_model("llama", SIZES))], Onnx(), tmp_path / "out")
    assert all(check.passed for check in report.checks)
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > (tmp_path / "out" / "model.onnx").stat().st_size / 10


def test_a_graph_that_differs_leaves_nothing(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Nothing:
        """A program whose file is empty."""

        def save(self, path: Path, external_data: bool) -> None:
            path.write_bytes(b"")

    monkeypatch.setattr(onnx_format, "_exported", lambda model: Nothing())
    monkeypatch.setattr(onnx_format, "_run", lambda folder, rows: [torch.zeros(len(row), 260) for row in rows])
    with pytest.raises(GateError, match="run by onnxruntime"):
        export([str(make_model("llama", SIZES))], Onnx(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
