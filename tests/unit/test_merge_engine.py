"""A merge gives the same bytes whatever the threads, the shards and the interruptions; and says what it cannot do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tests.merge_models import LLAMA, family, llama_shapes, random_values, read_values, write_model

from ftcli.errors import GateError, UsageError
from ftcli.files import sha256_of
from ftcli.merging.engine import JOURNAL, working_folder
from ftcli.merging.methods.registry import METHODS
from ftcli.merging.numbers import from_float32, to_float32
from ftcli.merging.outcome import merge_models
from ftcli.merging.stored import folder_tensors, read_header

TIES = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.5, density: 0.4}}
  - {model: b, parameters: {weight: 0.3, density: 0.5}}
  - {model: c, parameters: {weight: 0.2, density: 0.6}}
dtype: bfloat16
"""
DARE = TIES.replace("ties", "dare_ties") + "seed: 5\n"


def merged(folder: Path, recipe: str, name: str = "out", **options: int | bool) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(recipe)
    merge_models(path, folder / name, verify=False, **options)  # type: ignore[arg-type]
    return folder / name


def weights(folder: Path) -> dict[str, bytes]:
    found = {}
    for name, tensor in folder_tensors(folder).items():
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset)
            found[name] = file.read(tensor.num_bytes)
    return found


@pytest.mark.parametrize("recipe", [TIES, DARE])
def test_threads_and_shards_change_no_bit(recipe: str, tmp_path: Path) -> None:
    family(tmp_path / "one")
    family(tmp_path / "many", shards=4)
    expected = weights(merged(tmp_path / "one", recipe, threads=1))
    assert weights(merged(tmp_path / "one", recipe, "out4", threads=4)) == expected
    assert weights(merged(tmp_path / "many", recipe, threads=3)) == expected
    cut = merged(tmp_path / "one", recipe, "cut", shard_bytes=3000, threads=2)
    assert weights(cut) == expected
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(expected)
    assert all(sum(t.num_bytes for t in read_header(cut / file).values()) <= 3000 for file in set(index["weight_map"].values()))


def test_a_large_tensor_is_merged_in_pieces_as_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family(tmp_path)
    expected = weights(merged(tmp_path, DARE))
    monkeypatch.setattr("ftcli.merging.pieces.PIECE_ELEMENTS", 64)
    monkeypatch.setattr("ftcli.merging.pieces.row_ranges.__defaults__", (64,))
    assert weights(merged(tmp_path, DARE, "pieces")) == expected


def test_the_order_of_the_models_changes_no_bit(tmp_path: Path) -> None:
    family(tmp_path)
    recipe = "merge_method: {}\nbase_model: base\nmodels: [{}]\nparameters: {{weight: 0.4, density: 0.5}}\n"
    for method in ("dare_ties", "ties", "della"):
        first, second = (recipe.format(method, order) for order in ("a, b, c", "c, a, b"))
        assert weights(merged(tmp_path, first, f"{method}1")) == weights(merged(tmp_path, second, f"{method}2"))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_merge_of_files_is_the_merge_of_arrays_rounded_once(dtype: str, tmp_path: Path) -> None:
    family(tmp_path, dtype=dtype)
    out = merged(tmp_path, "merge_method: linear\nmodels: [a, b]\nparameters: {weight: 1}\n")
    first, second = read_values(tmp_path / "a"), read_values(tmp_path / "b")
    for name, found in read_values(out).items():
        expected = from_float32((first[name] * np.float32(0.5) + second[name] * np.float32(0.5)), dtype)
        assert np.array_equal(found, to_float32(expected, dtype))
    assert {tensor.dtype for tensor in folder_tensors(out).values()} == {dtype}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.base == "required" and method.keeps_base])
def test_tensors_that_no_model_changes_are_the_bases_bits(method: str, tmp_path: Path) -> None:
    shapes = llama_shapes(LLAMA)
    base = {
        name: np.where(np.arange(value.size).reshape(value.shape) % 3 == 0, -0.0, value) for name, value in random_values(shapes, 0).items()
    }
    base = {name: value.astype(np.float32) for name, value in base.items()}
    write_model(tmp_path / "base", base)
    for number, name in enumerate("abc"):
        changed = random_values(shapes, number + 1, base, 0.1)
        write_model(tmp_path / name, {key: changed[key] if "mlp" in key else base[key] for key in base})
    needed = METHODS[method].num_models[1] or 3
    given = [p for p in METHODS[method].parameters if p.default == "required"]
    values = "".join(f"  {parameter.name}: 0.3\n" for parameter in given)
    parameters = f"parameters:\n{values}" if values else ""
    out = merged(tmp_path, f"merge_method: {method}\nbase_model: base\nmodels: [{', '.join('abc'[:needed])}]\n{parameters}")
    before, after = weights(tmp_path / "base"), weights(out)
    assert all(before[name] == after[name] for name in before if "mlp" not in name)
    assert any(before[name] != after[name] for name in before if "mlp" in name)


def test_a_killed_merge_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**LLAMA, "num_hidden_layers": 6, "hidden_size": 64, "head_dim": 16, "intermediate_size": 512, "vocab_size": 2000}
    family(tmp_path, config=config)
    expected = weights(merged(tmp_path, DARE))
    recipe = tmp_path / "killed.yaml"
    recipe.write_text(DARE)
    # every tensor is noted at once, and takes a while
    script = (
        "import time, ftcli.merging.engine as engine\nfrom pathlib import Path\nfrom ftcli.merging.outcome import merge_models\n"
        "engine._WRITTEN_BEFORE_SYNC = 1\nmerge = engine._Work.merge\n"
        "def slow(self, tensor):\n    time.sleep(0.05)\n    merge(self, tensor)\nengine._Work.merge = slow\n"
        f"merge_models(Path({str(recipe)!r}), Path({str(tmp_path / 'killed')!r}), threads=1, verify=False)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    journal = working_folder(tmp_path / "killed") / JOURNAL
    deadline = time.monotonic() + 60
    while not (journal.is_file() and len(journal.read_text().splitlines()) > 5):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    with journal.open("a") as file:
        file.write('{"done": "half a li')
    outcome = merge_models(recipe, tmp_path / "killed", threads=2, resume=True, verify=False)
    assert 5 <= outcome.num_resumed < outcome.num_tensors
    assert weights(tmp_path / "killed") == expected
    assert sha256_of(tmp_path / "killed" / "model.safetensors") == sha256_of(tmp_path / "out" / "model.safetensors")
    assert not working_folder(tmp_path / "killed").exists()


def test_a_changed_recipe_does_not_go_on(tmp_path: Path) -> None:
    family(tmp_path)
    recipe = tmp_path / "out.yaml"
    recipe.write_text(TIES)
    folder = working_folder(tmp_path / "out")
    folder.mkdir()
    (folder / JOURNAL).write_text('{"fingerprint": "another"}\n')
    with pytest.raises(UsageError, match="changed since"):
        merge_models(recipe, tmp_path / "out", resume=True, verify=False)
    with pytest.raises(UsageError, match="nothing to go on with"):
        merge_models(recipe, tmp_path / "other", resume=True, verify=False)
    merge_models(recipe, tmp_path / "out", verify=False)
    with pytest.raises(UsageError, match="exists already"):
        merge_models(recipe, tmp_path / "out", verify=False)


def test_a_result_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    base = family(tmp_path, dtype="F32")
    write_model(
        tmp_path / "broken", {name: np.full_like(value, np.nan) if "norm" in name else value for name, value in base.items()}, dtype="F32"
    )
    recipe = tmp_path / "out.yaml"
    recipe.write_text("merge_method: linear\nmodels: [a, broken]\nparameters: {weight: 1}\n")
    with pytest.raises(GateError, match="`broken` has them already"):
        merge_models(recipe, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()
    recipe.write_text("merge_method: linear\nmodels: [a]\nparameters: {weight: 1000000, normalize: false}\nout_dtype: float16\n")
    with pytest.raises(GateError, match="too large for F16"):
        merge_models(recipe, tmp_path / "out", verify=False)


def test_a_global_trim_spends_the_density_where_the_changes_are(tmp_path: Path) -> None:
    base = family(tmp_path, dtype="F32")
    changed = {name: value + (1 if "mlp" in name else 0.01) * random_values({name: value.shape}, 3)[name] for name, value in base.items()}
    write_model(tmp_path / "far", changed, dtype="F32")
    recipe = "merge_method: ties\nbase_model: base\nmodels: [far]\nparameters: {weight: 1, density: 0.3, scope: global}\n"
    out = read_values(merged(tmp_path, recipe))
    kept = {name: int((out[name] != base[name]).sum()) for name in base}
    size = sum(value.size for value in base.values())
    assert sum(kept.values()) == int(0.3 * size)
    assert sum(count for name, count in kept.items() if "mlp" not in name) == 0


def test_gradients_filters_regular_expressions_and_layers(tmp_path: Path) -> None:
    family(tmp_path, dtype="F32")
    recipe = """
merge_method: wise_ft
base_model: base
models: [a]
parameters:
  alpha:
    - {regex: "self_attn\\\\.[qk]_proj", value: 1}
    - {filter: mlp, layers: [1, 3], value: 0}
    - [0, 1]
"""
    out = read_values(merged(tmp_path, recipe.replace("\\\\\\\\", "\\\\")))
    base, a = read_values(tmp_path / "base"), read_values(tmp_path / "a")
    for name, value in out.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        alpha = 0.0 if "embed" in name else 1.0 if layer is None else layer / 2
        alpha = 1.0 if "q_proj" in name or "k_proj" in name else 0.0 if "mlp" in name and layer in (1, 2) else alpha
        np.testing.assert_allclose(value, base[name] + np.float32(alpha) * (a[name] - base[name]), atol=1e-6)


def test_half_reset_puts_back_half_of_each_category(tmp_path: Path) -> None:
    family(tmp_path)
    recipe = "merge_method: linear\nbase_model: base\nmodels: [a]\nparameters: {weight: 1}\nreset: {fraction: 0.5}\n"
    out, base = weights(merged(tmp_path, recipe)), weights(tmp_path / "base")
    for layer in range(3):
        same = [name for name in out if f"layers.{layer}." in name and out[name] == base[name]]
        assert sum("self_attn" in name for name in same) == 2
        assert sum("mlp" in name for name in same) == 2  # half of three, to the even one
        assert sum("layernorm" in name for name in same) == 1


def test_the_manifest_has_the_hash_of_every_file_that_went_in(tmp_path: Path) -> None:
    family(tmp_path, shards=2)
    out = merged(tmp_path, TIES)
    manifest = json.loads((out / "manifest.json").read_text())
    assert len(manifest["inputs"]) == 8
    assert manifest["inputs"]["a/model-00001-of-00002.safetensors"] == sha256_of(tmp_path / "a" / "model-00001-of-00002.safetensors")
    assert str(tmp_path) not in (out / "README.md").read_text()
    assert not (out / JOURNAL).exists()


def test_modules_are_merged_each_with_its_own_settings(tmp_path: Path) -> None:
    """A model of two towers, one merged evenly and the other taken from one model, with a gradient over its own layers."""
    shapes = {**llama_shapes(LLAMA)}
    for layer in range(2):
        shapes[f"vision_tower.layers.{layer}.proj.weight"] = (6, 4)
    shapes["vision_tower.norm.weight"] = (4,)
    models = {name: random_values(shapes, seed) for seed, name in enumerate("ab")}
    for name, values in models.items():
        write_model(tmp_path / name, values, dtype="F32")
    shares = {"a": [1.0, 0.25], "b": [0.0, 0.75]}
    modules = {
        "vision_tower": {"models": [{"model": name, "parameters": {"weight": shares[name]}} for name in "ab"]},
        "default": {"models": [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"]},
    }
    (tmp_path / "r.yaml").write_text(json.dumps({"merge_method": "linear", "modules": modules}))
    merge_models(tmp_path / "r.yaml", tmp_path / "out", verify=False)
    merged = read_values(tmp_path / "out")
    assert merged.keys() == shapes.keys()
    for name, value in merged.items():
        share = {"vision_tower.layers.0.proj.weight": 1.0}.get(name, 0.25 if name.startswith("vision_tower") else 0.5)
        expected = share * models["a"][name] + (1 - share) * models["b"][name]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=name)
