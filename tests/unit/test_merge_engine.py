"""A merge gives the same bytes whatever the threads, the shards and the interruptions; and says what it cannot do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.merge_models import LLAMA, family, llama_shapes, merged, random_values, read_values, write_model, write_tensors

from ftcli.errors import GateError, UsageError
from ftcli.files import sha256_of
from ftcli.merging.engine import JOURNAL, _Work, working_folder
from ftcli.merging.hold import LOCK
from ftcli.merging.methods.registry import METHODS
from ftcli.merging.numbers import from_float32, to_float32
from ftcli.merging.outcome import left_behind, merge_models
from ftcli.merging.plan import plan_merge
from ftcli.merging.planned import TensorPlan
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


@pytest.mark.parametrize("threads", [1, 3])
def test_an_interrupted_merge_keeps_what_was_merged(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the fifth tensor: the four before it, far below what is written down by itself, are not merged again."""
    family(tmp_path)
    expected = weights(merged(tmp_path, DARE))
    done: list[str] = []
    merge = _Work.merge

    def interrupted(self: _Work, tensor: TensorPlan) -> None:
        if len(done) >= 4:
            raise KeyboardInterrupt
        merge(self, tensor)
        done.append(tensor.name)

    with monkeypatch.context() as patched:
        patched.setattr(_Work, "merge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merged(tmp_path, DARE, "two", threads=threads)
    recipe = tmp_path / "two.yaml"
    outcome = merge_models(recipe, tmp_path / "two", verify=False, threads=threads, resume=True)
    assert outcome.num_resumed == len(done) >= 4
    assert weights(tmp_path / "two") == expected


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
    assert len(manifest["inputs"]) == 4 * (2 + 2)  # of each model two shards, their index, and the configuration
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


def test_two_merges_into_one_place_never_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused while the first is at work, resumed or not, and the first ends as if there had been no second."""
    family(tmp_path)
    expected = weights(merged(tmp_path, TIES))
    recipe, other, out = tmp_path / "first.yaml", tmp_path / "second.yaml", tmp_path / "both"
    recipe.write_text(TIES)
    other.write_text(DARE)
    merge, refused, met = _Work.merge, [], []

    def with_company(work: _Work, tensor: TensorPlan) -> None:
        if not met:
            met.append(tensor.name)
            for resume in (False, True):
                with pytest.raises(UsageError, match=rf"`{out}` is being written by process {os.getpid()}") as error:
                    merge_models(other, out, resume=resume, verify=False)
                refused.append(error.value.exit_code)
        merge(work, tensor)

    monkeypatch.setattr(_Work, "merge", with_company)
    merge_models(recipe, out, threads=1, verify=False)
    assert refused == [2, 2]
    assert weights(out) == expected
    assert "ties" in (out / "merge_recipe.yaml").read_text()
    assert not (out / LOCK).exists()
    assert not working_folder(out).exists()


def test_a_merge_that_waited_at_the_door_finds_the_place_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was planned while the other one ran, and begins when that one has just ended."""
    family(tmp_path)
    out = tmp_path / "out"
    monkeypatch.setattr("ftcli.merging.outcome.plan_merge", lambda *given, **more: (merged_meanwhile(), plan_merge(*given, **more))[1])

    def merged_meanwhile() -> None:
        monkeypatch.undo()
        merged(tmp_path, TIES)

    (tmp_path / "late.yaml").write_text(DARE)
    with pytest.raises(UsageError, match="exists already"):
        merge_models(tmp_path / "late.yaml", out, verify=False)
    assert "dare" not in (out / "merge_recipe.yaml").read_text()
    assert not working_folder(out).exists()


def test_a_merge_that_fails_lets_go_of_its_place(tmp_path: Path) -> None:
    family(tmp_path)
    large = "merge_method: linear\nmodels: [a]\nparameters: {weight: 1000000, normalize: false}\nout_dtype: float16\n"
    with pytest.raises(GateError):
        merged(tmp_path, large)
    assert not working_folder(tmp_path / "out").exists()
    merged(tmp_path, TIES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda here: Path("."), "is the folder we are in"),
        (lambda here: here.absolute(), "is the folder we are in"),
        (lambda here: Path("n" * 250), "a name is too long"),
        (lambda here: Path("n" * 256) / "out", "a name is too long"),
        (lambda here: link(here / "lost", here / "nowhere"), "leads nowhere"),
        (lambda here: link(here / "found", here.parent), "is a link"),
    ],
)
def test_a_place_that_can_get_no_folder_is_refused_before_any_work(
    make: Callable[[Path], Path], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family(tmp_path)
    (tmp_path / "r.yaml").write_text(TIES)
    here = tmp_path / "empty"
    here.mkdir()
    monkeypatch.chdir(here)
    out = make(here)
    before = sorted(os.listdir(here))
    with pytest.raises(UsageError, match=message):
        merge_models(tmp_path / "r.yaml", out, verify=False)
    assert sorted(os.listdir(here)) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


class Stopped(BaseException):
    """As Ctrl-C."""


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def merge_of_everything(folder: Path) -> Path:
    """A recipe that reads statistics, an adapter, tokenizers and templates."""
    shapes = llama_shapes(LLAMA)
    family(folder)
    for number, name in enumerate("ab"):
        weights = {key: ("F32", np.abs(value)) for key, value in random_values(shapes, number).items()}
        write_tensors(folder / f"{name}.safetensors", weights)
        words = {f"w{row}": row for row in range(40)}
        write_json(folder / name / "tokenizer.json", {"model": {"type": "BPE", "vocab": words, "merges": []}, "added_tokens": []})
        write_json(folder / name / "tokenizer_config.json", {"chat_template": "one"})
        write_json(folder / name / "generation_config.json", {"eos_token_id": 2})
    target = "base_model.model.model.layers.1.self_attn.q_proj"
    write_json(folder / "lora" / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]})
    factors = random_values({f"{target}.lora_A.weight": (2, 16), f"{target}.lora_B.weight": (16, 2)}, 5)
    write_tensors(folder / "lora" / "adapter_model.safetensors", {name: ("F32", value) for name, value in factors.items()})
    recipe = folder / "all.yaml"
    models = [{"model": "a", "statistics": "a.safetensors"}, {"model": "b+lora", "statistics": "b.safetensors"}]
    write_json(recipe, {"merge_method": "fisher", "models": models, "tokenizer": {"source": "a"}, "chat_template": "auto"})
    return recipe


def test_a_merge_goes_on_only_while_nothing_that_goes_in_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = merge_of_everything(tmp_path), tmp_path / "out"
    fresh = tmp_path / "fresh"
    merge_models(recipe, fresh, verify=False)
    merge, begun = _Work.merge, []

    def interrupted(work: _Work, tensor: TensorPlan) -> None:
        begun.append(tensor.name)
        if len(begun) > 4:
            raise Stopped
        merge(work, tensor)

    with monkeypatch.context() as patched:
        patched.setattr(_Work, "merge", interrupted)
        patched.setattr("ftcli.merging.engine._WRITTEN_BEFORE_SYNC", 1)
        with pytest.raises(Stopped):
            merge_models(recipe, out, threads=1, verify=False)
    assert left_behind(out) is not None
    files = ["a.safetensors", "b.safetensors", "a/model.safetensors", "lora/adapter_model.safetensors", "lora/adapter_config.json"]
    files += [f"{name}/{file}" for name in "ab" for file in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    for name in [*files, "a/generation_config.json"]:
        path, before = tmp_path / name, (tmp_path / name).read_bytes()
        status = path.stat()
        text = before.decode("latin-1")
        after = text[:-1] + chr(ord(text[-1]) ^ 1) if name.endswith(".safetensors") else text.replace("{", '{"new": 1, ', 1)
        path.write_bytes(after.replace('"w7": 7, "w8": 8', '"w8": 7, "w7": 8').encode("latin-1"))
        with pytest.raises(UsageError, match="changed since"):
            merge_models(recipe, out, resume=True, verify=False)
        path.write_bytes(before)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.utime(tmp_path / "a" / "tokenizer.json")
    outcome = merge_models(recipe, out, resume=True, verify=False)
    assert outcome.num_resumed == 4
    assert sha256_of(out / "model.safetensors") == sha256_of(fresh / "model.safetensors")
    assert left_behind(out) is None


def test_the_manifest_has_the_small_files_and_the_statistics_too(tmp_path: Path) -> None:
    merge_models(merge_of_everything(tmp_path), tmp_path / "out", verify=False)
    inputs = json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]
    small = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    expected = {f"a/{name}": tmp_path / "a" / name for name in ("model.safetensors", *small)}
    expected |= {f"b+lora/{name}": tmp_path / "b" / name for name in ("model.safetensors", *small)}
    expected |= {f"b+lora/{name}": tmp_path / "lora" / name for name in ("adapter_model.safetensors", "adapter_config.json")}
    expected |= {name: tmp_path / name for name in ("a.safetensors", "b.safetensors")}
    assert inputs == {name: sha256_of(path) for name, path in expected.items()}


def test_a_folder_of_this_machine_never_becomes_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family(tmp_path / "runs")
    (tmp_path / "base").mkdir()
    (tmp_path / "runs" / "c").rename(tmp_path / "base" / "c")
    monkeypatch.chdir(tmp_path)
    long_form = {"model": {"path": f"{tmp_path}/runs/b"}}
    models = [{"model": model} for model in ("runs/a", long_form, "base/c")]
    out = merged(tmp_path, json.dumps({"merge_method": "linear", "models": models, "parameters": {"weight": 1}}))
    card = (out / "README.md").read_text()
    assert "base_model:" not in card
    assert "runs/" not in card
    assert str(tmp_path) not in card
    assert "| b | model |" in card
