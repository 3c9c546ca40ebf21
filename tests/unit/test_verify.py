"""`ftcli verify` holds of what a run left, and names whatever someone has changed since."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftcli.cli.main import run as ftcli

RECIPE = """version: 1
name: proven
model: {base: "builtin:tiny"}
data:
  train:
    - {source: {kind: file, path: rows.jsonl}, format: {kind: chat}}
  evaluation:
    - {name: orders, source: {kind: builtin, name: orders, split: test}, limit: 4}
method: {kind: lora, rank: 4}
train: {steps: 3, global_batch_size: 4, lr: 1e-3}
every: {log: 1, save: 2}
output: run
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, a run of them, and its merge."""
    from ftcli.builtin.catalogue import dataset_path

    folder = tmp_path_factory.mktemp("verify")
    with gzip.open(dataset_path("orders", "train"), "rt", encoding="utf-8") as file:
        rows = [next(file) for _ in range(12)]
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.replace("output: run", f"output: {folder / 'run'}"), encoding="utf-8")
    assert ftcli(["train", str(folder / "recipe.yaml")]) == 0
    assert ftcli(["merge", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run to change."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


Verify = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Verify:
    def _verify(target: Path) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = ftcli(["verify", str(target), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return _verify


def failing(report: dict[str, Any]) -> list[str]:
    return [proof["name"] for proof in report["proofs"] if proof["outcome"] == "fails"]


def flip_bit(path: Path, place: int) -> None:
    """Change the lowest bit of one byte."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def test_an_untouched_run_and_its_merge_hold(run: Path, verify: Verify) -> None:
    code, report = verify(run)
    assert (code, failing(report), report["verified"]) == (0, [], True)
    held = {proof["name"] for proof in report["proofs"] if proof["outcome"] == "holds"}
    wanted = {"files", "run", "checkpoints", "data", "order of examples", "base", "saved = trained", "layout", "template"}
    wanted |= {"generation stops", "answers", "metrics on the probe rows", "merged/ files", "merged/ written = merged"}
    # Three steps teach no model to stop; the proof holds if as many answers end as did.
    assert wanted <= held
    skipped = {proof["name"] for proof in report["proofs"] if proof["outcome"] == "not replayed"}
    assert skipped == {"frozen weights"}


def test_an_export_without_a_model_of_its_own_is_no_run(run: Path, verify: Verify, tmp_path: Path) -> None:
    """As gguf, ollama and vllm folders are; what their own runtimes found stands in the manifest."""
    output = tmp_path / "served"
    assert ftcli(["export", str(run), "--to", "vllm", "-o", str(output)]) == 0
    code, report = verify(output)
    assert (code, failing(report), report["verified"]) == (0, [], True)
    assert [proof["name"] for proof in report["proofs"] if proof["outcome"] == "holds"] == ["files"]
    flip_bit(output / "serve.sh", -2)
    assert verify(output)[0] == 1


def test_one_bit_of_a_weight_is_named_and_the_last_byte_counts(run: Path, verify: Verify) -> None:
    flip_bit(run / "adapter" / "adapter_model.safetensors", -1)
    code, report = verify(run)
    assert code == 1
    assert "file adapter/adapter_model.safetensors" in failing(report)
    # the highest byte of the last number: not a rounding error
    assert "saved = trained" in failing(report)


def test_an_edited_configuration_is_named(run: Path, verify: Verify) -> None:
    path = run / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": ', '"lora_alpha": 9'))
    code, report = verify(run)
    assert code == 1
    assert {"file adapter/adapter_config.json", "saved = trained"} <= set(failing(report))


def test_another_template_is_named_and_shown_to_give_other_text(run: Path, verify: Verify) -> None:
    path = run / "adapter" / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>", "<|end|>"))
    code, report = verify(run)
    assert code == 1
    assert {"file adapter/chat_template.jinja", "template"} <= set(failing(report))


def test_what_is_gone_or_added_is_named(run: Path, verify: Verify) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "adapter" / "extra.json").write_text("{}")
    code, report = verify(run)
    assert code == 1
    assert {"file metrics.jsonl", "file adapter/extra.json", "order of examples"} <= set(failing(report))


def test_a_weight_file_that_cannot_be_loaded_is_no_crash(run: Path, verify: Verify) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    code, report = verify(run)
    assert code == 1
    assert {"saved = trained", "generation stops"} <= set(failing(report))


def test_other_training_data_are_not_what_the_manifest_says(trained: Path, run: Path, verify: Verify) -> None:
    rows = trained / "rows.jsonl"
    whole = rows.read_text(encoding="utf-8")
    try:
        rows.write_text(whole.replace("large", "small", 1), encoding="utf-8")
        code, report = verify(run)
        assert code == 1
        assert {"data", "order of examples"} <= set(failing(report))
        told = next(proof["detail"] for proof in report["proofs"] if proof["name"] == "data")
        assert told.endswith("has changed since it was trained on")
        rows.unlink()
        outcomes = {proof["name"]: proof["outcome"] for proof in verify(run)[1]["proofs"]}
        assert [outcomes[name] for name in ("data", "order of examples", "saved = trained")] == ["not replayed", "not replayed", "holds"]
    finally:
        rows.write_text(whole, encoding="utf-8")


def test_a_damaged_merge_and_a_damaged_checkpoint_are_named(run: Path, verify: Verify) -> None:
    flip_bit(run / "merged" / "model.safetensors", -2)
    step = sorted((run / "checkpoints").glob("step-*"))[-1]
    flip_bit(step / "trainable.safetensors", -1)
    code, report = verify(run)
    assert code == 1
    assert {"merged/ file model.safetensors", f"checkpoint {int(step.name.removeprefix('step-'))}"} <= set(failing(report))
    # a merge by itself, whose adapter has been put elsewhere
    manifest = json.loads((run / "merged" / "manifest.json").read_text())
    (run / "merged" / "manifest.json").write_text(json.dumps({**manifest, "source": "/nowhere/run"}))
    outcomes = {proof["name"]: proof["outcome"] for proof in verify(run / "merged")[1]["proofs"]}
    assert outcomes["merged = attached"] == "not replayed"


def test_a_merge_is_measured_against_its_adapter_again(run: Path, verify: Verify) -> None:
    from safetensors.torch import load_file, save_file

    path = run / "merged" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file({**tensors, name: tensors[name] * 1.5}, path, {"format": "pt"})
    report = verify(run / "merged")[1]
    assert {"file model.safetensors", "written = merged", "merged = attached"} <= set(failing(report))


def test_a_folder_without_a_manifest_and_an_old_run_prove_nothing(run: Path, verify: Verify, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert verify(tmp_path / "empty")[0] == 2
    manifest = json.loads((run / "manifest.json").read_text())
    for key in ("files", "base_fingerprint"):
        del manifest[key]
    (run / "manifest.json").write_text(json.dumps(manifest))
    outcomes = {proof["name"]: proof["outcome"] for proof in verify(run)[1]["proofs"]}
    assert (outcomes["files"], outcomes["base"]) == ("not replayed", "not replayed")


@pytest.mark.parametrize(("text", "why"), [(None, "manifest.json: missing"), ("{ broken", "manifest.json: no JSON object")])
def test_a_run_whose_manifest_is_gone_or_broken_says_so_and_nothing_else(text: str | None, why: str, run: Path, verify: Verify) -> None:
    (run / "manifest.json").unlink()
    if text is not None:
        (run / "manifest.json").write_text(text)
    code, report = verify(run)
    assert code == 1
    own = [proof for proof in report["proofs"] if not proof["name"].startswith("merged/")]
    assert [proof["detail"] for proof in own] == [f"{why}: there is nothing to hold this run against"]


def test_data_that_the_manifest_has_no_hash_of_are_not_called_others(run: Path, verify: Verify) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "hashes": {}}))
    found = {proof["name"]: proof for proof in verify(run)[1]["proofs"]}
    assert (found["data"]["outcome"], found["data"]["detail"]) == ("not replayed", "the manifest has no hashes of tokenizer and sources")
    (run / "manifest.json").write_text(json.dumps({**manifest, "hashes": {**manifest["hashes"], "tokenizer": "ab" * 32}}))
    found = {proof["name"]: proof for proof in verify(run)[1]["proofs"]}
    assert found["data"]["detail"] == "tokenizer has changed since it was trained on"
