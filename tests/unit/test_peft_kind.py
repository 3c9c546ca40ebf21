"""The `peft` kind: every type of PEFT that it takes, on tiny real models of several shapes."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from scripts.peft_fields import installed_fields
from tests.conftest import ROOT

from ftcli.errors import RequestError
from ftcli.methods.adapter import load_adapter, merge_adapter
from ftcli.methods.context import AttachContext
from ftcli.methods.peft import Peft, TypeName
from ftcli.methods.peft_fields import FIELDS
from ftcli.methods.peft_types import LEFT_OUT, LEFT_OUT_FIELDS, TYPES
from ftcli.models.load import load_model, save_weights
from ftcli.models.settings import Init, Model

VOCABULARY = 61
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
SIZES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": {**SMALL, "tie_word_embeddings": True},
    "phi3": SMALL,
    "mixtral": {**SMALL, "num_local_experts": 4},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
# Random factors on both sides: their product is small at the start, and there would be no gradient without it.
NEARLY_IDENTITY = {"unilora": 2e-2, "vblora": 2e-1}


@cache
def _kept(name: str) -> Any:
    special = {"vocab_size": VOCABULARY, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
    return load_model(Model(init=Init(architecture=name, config={**special, **SIZES[name]})), None, seed=3)


def base(name: str) -> Any:
    """A fresh copy of a tiny random model."""
    return copy.deepcopy(_kept(name))


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    found: torch.Tensor = module.eval()(IDS).logits
    return found


def train_some(method: Peft, module: Any, lr: float = 5e-3, steps: int = 4) -> None:
    module.train()
    optimizer = torch.optim.Adam(method.parameter_groups(module, lr, 0.0))
    for _ in range(steps):
        optimizer.zero_grad()
        module(IDS, labels=IDS).loss.backward()
        optimizer.step()


def attached(method: Peft, name: str) -> Any:
    return method.attach(base(name), AttachContext(seed=5))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "mixtral", "gpt2"])
def test_every_type_starts_at_the_base_moves_only_itself_reloads_and_merges_or_says_why_not(kind: Any, name: str, tmp_path: Path) -> None:
    method = Peft(type=kind)
    if name == "gpt2" and not TYPES[kind].conv1d:
        with pytest.raises(RequestError, match=r"cannot adapt `transformer\.h\.0\.attn\.c_attn`, a Conv1D"):
            attached(method, name)
        return
    plain = logits(base(name))
    module = attached(method, name)
    assert (logits(module) - plain).abs().max() < NEARLY_IDENTITY.get(kind, 2e-5)
    before = {n: t.detach().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}
    train_some(method, module)
    after = dict([*module.named_parameters(), *module.named_buffers()])
    declared = {n for n, p in module.named_parameters() if p.requires_grad}
    assert declared
    assert {n for n in after if not torch.equal(after[n], before[n])} <= declared
    trained = logits(module)
    assert (trained - plain).abs().max() > 1e-3
    method.save(module, tmp_path)
    torch.manual_seed(99)
    reloaded = method.load(base(name), tmp_path)
    assert not any(p.requires_grad for p in reloaded.parameters())
    torch.testing.assert_close(logits(reloaded), trained, rtol=0, atol=1e-5)
    if TYPES[kind].merges:
        with pytest.raises(RequestError, match=f"PEFT's `{kind}` cannot be merged"):
            method.merge(module)
        return
    merged = method.merge(module)
    assert {type(m) for m in merged.modules()} == {type(m) for m in base(name).modules()}
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-4)
    save_weights(merged, tmp_path / "merged")


def test_adapters_are_float32_beside_a_bfloat16_base_and_the_merge_has_its_dtype() -> None:
    for kind in ("miss", "oft", "vera", "loha", "hra", "fourierft", "shira", "delora", "road"):
        method = Peft(type=kind)  # type: ignore[arg-type]
        module = method.attach(base("llama").bfloat16(), AttachContext(seed=5))
        assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}, kind
        plain = logits(base("llama").bfloat16()).float()
        assert (logits(module).float() - plain).abs().max() < 0.1, kind
        train_some(method, module)
        trained = logits(module).float()
        merged = method.merge(module)
        assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}, kind
        assert (logits(merged).float() - trained).abs().max() < 0.15 * max(1.0, float(trained.abs().max())), kind


def test_the_start_depends_on_the_seed_alone() -> None:
    from peft import get_peft_model_state_dict

    def start(kind: Any, seed: int, disturbance: int) -> list[torch.Tensor]:
        torch.manual_seed(disturbance)
        module = Peft(type=kind).attach(base("llama"), AttachContext(seed=seed))
        return list(get_peft_model_state_dict(module).values())

    for kind in ("loha", "shira", "vblora", "hra"):
        same = zip(start(kind, 1, 10), start(kind, 1, 11), strict=True)
        assert all(torch.equal(a, b) for a, b in same), kind
        other = zip(start(kind, 1, 10), start(kind, 2, 10), strict=True)
        assert not all(torch.equal(a, b) for a, b in other), kind


def test_modules_trained_in_full_are_saved_and_merged(tmp_path: Path) -> None:
    method = Peft(type="loha", config={"r": 2}, extra_trained_modules=("embed_tokens", "norm"))
    module: Any = attached(method, "qwen2")
    train_some(method, module)
    trained = logits(module)
    method.save(module, tmp_path)
    torch.testing.assert_close(logits(method.load(base("qwen2"), tmp_path)), trained, rtol=0, atol=1e-5)
    merged: Any = method.merge(module)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-4)


def test_the_saved_adapter_works_in_plain_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    for kind in ("oft", "vera", "shira"):
        method = Peft(type=kind)  # type: ignore[arg-type]
        module = attached(method, "llama")
        train_some(method, module)
        method.save(module, tmp_path / kind)
        torch.testing.assert_close(logits(PeftModel.from_pretrained(base("llama"), tmp_path / kind)), logits(module), rtol=0, atol=1e-5)


def test_an_adapter_of_another_type_or_with_other_tensors_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    method = Peft(type="loha")
    method.save(attached(method, "llama"), tmp_path)
    with pytest.raises(RequestError, match="peft_type is `LOHA`, not `LOKR`"):
        Peft(type="lokr").load(base("llama"), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    save_file({**{n: t for n, t in tensors.items() if n != first}, "other": tensors[first]}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RequestError, match=r"1 tensors not in the file.*\n.*\n?.*1 tensors without a place"):
        method.load(base("llama"), tmp_path)


def test_a_layer_that_merges_to_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.loha.layer import Linear

    monkeypatch.setattr(Linear, "merge", lambda self, safe_merge=False: None)
    method = Peft(type="loha")
    module = attached(method, "llama")
    train_some(method, module)
    with pytest.raises(RequestError, match=r"merged and attached differ by"):
        method.merge(module)


def test_what_depends_on_the_token_is_refused_also_without_the_kind(tmp_path: Path) -> None:
    method = Peft(type="lily")
    method.save(attached(method, "llama"), tmp_path)
    with pytest.raises(RequestError, match="not supported for Lily"):
        merge_adapter(load_adapter(base("llama"), tmp_path))


def test_a_pattern_in_the_configuration_means_ends_of_names_and_has_to_match() -> None:
    method = Peft(type="loha", config={"r": 4, "rank_pattern": {"layers.[1].*.q_proj": 2}})
    ranks = {name: p.shape[-1] for name, p in attached(method, "llama").named_parameters() if "q_proj.hada_w1_a" in name}
    assert sorted(ranks.values()) == [2, 4]
    assert next(rank for name, rank in ranks.items() if ".1." in name) == 2
    with pytest.raises(RequestError, match="`q_porj` matches no target"):
        attached(Peft(type="loha", config={"rank_pattern": {"q_porj": 2}}), "llama")


def test_what_peft_refuses_and_what_it_leaves_out_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"PEFT's `c3a` does not fit the model"):
        attached(Peft(type="c3a", config={"block_size": 7}), "llama")
    with pytest.raises(RequestError, match="`q_porj` matches no linear layer"):
        attached(Peft(type="oft", target_modules=("q_porj",)), "llama")


def test_the_table_of_fields_is_that_of_the_installed_peft() -> None:
    assert installed_fields() == FIELDS
    assert set(get_args(TypeName)) == set(TYPES) == set(FIELDS)


def test_every_type_of_peft_is_taken_or_left_out_with_a_reason() -> None:
    from peft.utils import PeftType

    assert {member.value.lower() for member in PeftType} - {"bottleneck"} <= set(TYPES) | set(LEFT_OUT)
    assert not set(TYPES) & set(LEFT_OUT)
    fields = {name for table in FIELDS.values() for name in table}
    assert {name for name in LEFT_OUT_FIELDS if name not in fields} <= {"task_type", "peft_type", "auto_mapping", "peft_version"} | {
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    }


@pytest.mark.parametrize(
    ("fields", "path", "message", "hint"),
    [
        ({"type": "lohaa"}, "type", "found text `lohaa`", "did you mean `loha`?"),
        ({"type": "xlora"}, "type", "`xlora` is not among the types: it mixes LoRA adapters that are trained already", None),
        ({"type": "lora"}, "type", "it is a kind of its own: `{kind: lora}`", None),
        (
            {"type": "loha", "config": {"rank_dropuot": 0.1}},
            "config.rank_dropuot",
            "PEFT's `loha` has no field",
            "did you mean `rank_dropout`?",
        ),
        ({"type": "loha", "config": {"rank": 4}}, "config.rank", "PEFT's `loha` has no field `rank`", "it is called `r` there"),
        ({"type": "vera", "config": {"dropout": 0.1}}, "config.dropout", "has no field `dropout`", "it is called `vera_dropout` there"),
        ({"type": "loha", "config": {"r": "4"}}, "config.r", "found text `4`, allowed: a whole number", "write it without quotes"),
        ({"type": "loha", "config": {"r": True}}, "config.r", "found `true`, allowed: a whole number", None),
        ({"type": "road", "config": {"variant": "road_3"}}, "config.variant", "allowed: `road_1` or `road_2` or `road_4`", "did you mean"),
        ({"type": "loha", "config": {"inference_mode": True}}, "config.inference_mode", "it is the run's own", None),
        ({"type": "oft", "config": {"bias": "all"}}, "config.bias", "it would train the base's own biases", None),
        ({"type": "oft", "config": {"target_modules": ["q_proj"]}}, "config.target_modules", "it stands beside `type`", None),
    ],
)
def test_a_wrong_configuration_is_named_with_its_place(
    fields: dict[str, Any], path: str, message: str, hint: str | None, tmp_path: Path
) -> None:
    from ftcli.errors import RecipeError
    from ftcli.recipe.load import load_recipe

    (tmp_path / "recipe.yaml").write_text(document(fields))
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    problem = caught.value.problems[0]
    assert len(caught.value.problems) == 1
    assert problem.where.startswith(f"method.{path} (line ")
    assert message in problem.what
    assert (hint or "") in (problem.hint or "")


def document(method: dict[str, Any]) -> str:
    return json.dumps(
        {
            "version": 1,
            "name": "a",
            "model": {"base": "builtin:tiny"},
            "data": {"train": [{"source": {"kind": "builtin", "name": "orders"}}]},
            "method": {"kind": "peft", **method},
        },
        indent=1,
    )


def test_a_wrong_field_is_found_without_importing_peft(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(document({"type": "loha", "config": {"rnak_dropout": 1}}))
    program = "import sys; from ftcli.cli.main import run; code = run(['check', '--fast', sys.argv[1]]); "
    program += "print([name for name in ('peft', 'torch', 'transformers') if name in sys.modules]); sys.exit(code)"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "recipe.yaml")], capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": "src"}
    )
    assert done.returncode == 2
    assert done.stdout.strip() == "[]"
    assert "did you mean `rank_dropout`?" in done.stderr
    assert time.monotonic() - began < 15  # a second on an idle machine; importing PEFT alone takes longer on a busy one


def test_default_learning_rates_are_those_of_the_type() -> None:
    assert Peft(type="vera").default_lr == TYPES["vera"].lr != Peft(type="miss").default_lr
    groups = Peft(type="boft").parameter_groups(attached(Peft(type="boft"), "llama"), 1e-3, 0.1)
    assert {group["weight_decay"] for group in groups} == {0.0}
    groups = Peft(type="loha").parameter_groups(attached(Peft(type="loha"), "llama"), 1e-3, 0.1)
    assert {group["weight_decay"] for group in groups} == {0.1}


def test_a_block_size_that_does_not_divide_a_layer_is_not_replaced_by_another() -> None:
    with pytest.raises(RequestError, match=r"method.config.oft_block_size: found 7, allowed: a divisor of the layers' inputs, 32, 48\n"):
        attached(Peft(type="oft", config={"oft_block_size": 7}), "llama")
    attached(Peft(type="oft", config={"oft_block_size": 16}), "llama")
