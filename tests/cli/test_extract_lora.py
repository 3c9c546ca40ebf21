"""`ftcli extract-lora`: an adapter of the difference between two model folders, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_chat_model import write_tiny_chat_model

from ftcli.cli.main import run


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and the same with two layers changed."""
    from safetensors.torch import load_file, save_file
    from torch import Generator, randn

    base, tuned = tmp_path / "base", tmp_path / "tuned"
    write_tiny_chat_model(base)
    write_tiny_chat_model(tuned)
    weights = load_file(tuned / "model.safetensors")
    generator = Generator().manual_seed(1)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        weights[name] += 0.5 * randn(len(weights[name]), 2, generator=generator) @ randn(2, weights[name].shape[1], generator=generator)
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    return base, tuned


def test_the_adapter_is_the_difference(models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = models
    assert run(["extract-lora", str(tuned), "--base", str(base), "-o", str(tmp_path / "out"), "--rank", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["energy"] > 1 - 1e-6
    assert [module["rank"] for module in report["modules"]] == [2, 2]
    assert report["unchanged"] == 13
    assert report["after"]["kl"] < 1e-6 < report["before"]["kl"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_an_energy_target_gives_each_layer_its_own_rank(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = models
    assert run(["extract-lora", str(tuned), "--base", str(base), "-o", str(tmp_path / "out"), "--energy", "0.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [module["rank"] for module in report["modules"]] == [1, 1]
    assert all(0.5 <= module["energy"] < 1 for module in report["modules"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{base}", "--base", "{base}", "-o", "{out}"], "the same weights"),
        (["{tuned}", "--base", "nowhere/at/all", "-o", "{out}"], "is no folder"),
        (["{tuned}", "--base", "{base}", "-o", "{base}"], "exists already"),
        (["{tuned}", "--base", "{base}", "-o", "{out}", "--dtype", "int8"], "unknown dtype `int8`"),
        (["{tuned}", "--base", "{base}", "-o", "{out}", "--rank", "0"], "rank"),
        (["{tuned}", "--base", "builtin:tiny", "-o", "{out}"], "cannot be extracted"),
    ],
)
def test_a_wrong_request_is_refused(
    arguments: list[str], message: str, models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = models
    filled = [argument.format(base=base, tuned=tuned, out=tmp_path / "out") for argument in arguments]
    assert run(["extract-lora", *filled]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_extractions_into_one_folder_never_mix(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.errors import UsageError
    from ftcli.exporting import extract_lora

    base, tuned = models
    output, compared, refused = tmp_path / "out", extract_lora._compared, []

    def with_company(*given: Any) -> Any:
        monkeypatch.setattr(extract_lora, "_compared", compared)
        with pytest.raises(UsageError, match=r"exists already|is being written by process"):
            extract_lora.extract(str(base), str(tuned), output)
        monkeypatch.setattr(extract_lora, "check_new_folder", lambda path: None)
        with pytest.raises(UsageError, match="is being written by process"):
            extract_lora.extract(str(base), str(tuned), output)
        refused.append(output)
        return compared(*given)

    monkeypatch.setattr(extract_lora, "_compared", with_company)
    extract_lora.extract(str(tuned), str(base), output)
    assert refused == [output]
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
