"""`ftcli export`: what it refuses, what it prints, and what it uploads."""

from __future__ import annotations

import builtins
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_chat_model import write_tiny_chat_model

from ftcli.cli.main import run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "argument"),
        (["builtin:tiny"], "--to"),
        (["builtin:tiny", "--to", "ggfu"], "did you mean `gguf`?"),
        (["builtin:tiny", "--to", "awq"], "--to gptq"),
        (["builtin:tiny", "--to", "gguf", "--dtype", "q4_k"], "did you mean `q4_k_"),
        (["builtin:tiny", "--to", "hf", "--dtype", "int8"], "allowed: auto, float32, bfloat16, float16"),
        (["builtin:tiny", "--to", "hf", "--max-shard-size", "0GB"], "is no size"),
        (["builtin:tiny", "--to", "hf", "--push", "nobody"], "--push OWNER/NAME"),
        (["runs/nothing", "--to", "hf"], "runs/nothing"),
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["export", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_report_is_json_and_the_next_command_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_chat_model(tmp_path / "model")
    assert run(["export", str(tmp_path / "model"), "--to", "hf", "-o", str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["format"] == "hf"
    assert report["dtype"] == "float32"
    assert {check["passed"] for check in report["checks"]} == {True}
    assert f"ftcli generate {tmp_path / 'out'}" in printed.err


@pytest.mark.parametrize(("to", "package", "extra"), [("gguf", "gguf", "gguf"), ("onnx", "onnxscript", "onnx")])
def test_a_missing_package_is_named_with_its_extra(
    to: str, package: str, extra: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    true_import = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return true_import(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    assert run(["export", "builtin:tiny", "--to", to, "-o", str(tmp_path / "out")]) == 2
    assert f'pip install "ftcli[{extra}]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_extra_that_is_named_can_be_installed() -> None:
    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    files = [root / "README.md", *(root / "docs").glob("*.md"), *(root / "src").rglob("*.py")]
    named = {name: file.name for file in files for name in re.findall(r"ftcli\[([a-z-]+)\]", file.read_text())}
    assert "llama-cpp" in named
    assert {name: file for name, file in named.items() if name not in extras} == {}
    assert extras["llama-cpp"][0].startswith("llama-cpp-python")


def test_a_finished_export_is_uploaded_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a stand-in: what would be sent is looked at, and nothing is sent."""
    sent: dict[str, Any] = {}

    class Hub:
        def create_repo(self, repository: str, **given: Any) -> None:
            sent["created"] = (repository, given)

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
            sent["uploaded"] = (repo_id, sorted(path.name for path in Path(folder_path).iterdir()))
            return "an address"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    write_tiny_chat_model(tmp_path / "model")
    assert run(["export", str(tmp_path / "model"), "--to", "hf", "-o", str(tmp_path / "out"), "--push", "me/model"]) == 0
    assert sent["created"] == ("me/model", {"private": True, "exist_ok": True})
    assert sent["uploaded"][0] == "me/model"
    assert {"README.md", "manifest.json", "model.safetensors", "tokenizer.json"} <= set(sent["uploaded"][1])
    assert "pushed: an address" in capsys.readouterr().out


def test_an_upload_that_fails_keeps_the_export(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def create_repo(self, repository: str, **given: Any) -> None:
            raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    write_tiny_chat_model(tmp_path / "model")
    assert run(["export", str(tmp_path / "model"), "--to", "hf", "-o", str(tmp_path / "out"), "--push", "me/model"]) == 1
    said = capsys.readouterr().err
    assert "could not be pushed to: no route" in said
    assert f"hf upload --private me/model {tmp_path / 'out'}" in said
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_without_a_login_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert run(["export", "builtin:tiny", "--to", "hf", "-o", str(tmp_path / "out"), "--push", "me/model"]) == 2
    assert "hf auth login" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
