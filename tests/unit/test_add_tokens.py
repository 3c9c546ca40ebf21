"""New tokens: found in texts, given rows that change nothing for old ones, trained alone beside any adapter, and found again."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ftcli.cli.main import run
from ftcli.errors import RequestError
from ftcli.layout.model import inner_model
from ftcli.methods.bottleneck_adapter import BottleneckAdapter
from ftcli.methods.context import AttachContext
from ftcli.methods.freeze import Freeze
from ftcli.methods.full import Full
from ftcli.methods.ia3 import Ia3
from ftcli.methods.lora import Lora
from ftcli.methods.peft import Peft
from ftcli.methods.prefix import Prefix
from ftcli.methods.prompt import Prompt
from ftcli.models.add_tokens import AddTokens
from ftcli.models.added_rows import fold_rows, let_rows_train, read_rows, rows_in_place, write_rows
from ftcli.models.changes import changes_of, probe_logits
from ftcli.models.load import load_model
from ftcli.models.mine_tokens import count_words, mine_tokens
from ftcli.models.settings import Init, Model
from ftcli.models.tokenizer import differences_from_transformers, load_tokenizer
from ftcli.recipe.load import load_recipe
from ftcli.reporting.live import Reporter
from ftcli.training.new_tokens import NewTokens
from ftcli.training.run import run_recipe

WORDS = ("quinquereme", "Nineveh")
TEXT = "A quinquereme of Nineveh, Nineveh! Quinqueremes rowed on, and quinquereme after quinquereme."
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen3": {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "gemma3_text": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of small random models with the embedded tokenizer."""
    found = {}
    for kind, fields in CONFIGS.items():
        folder = tmp_path_factory.mktemp(kind)
        tokenizer = load_tokenizer("builtin:tiny")
        init = Model(init=Init(architecture=kind, config=fields), tokenizer="builtin:tiny")
        model = load_model(init, tokenizer, seed=3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
        model.save_pretrained(folder)
        tokenizer.save(folder)
        found[kind] = str(folder)
    return found


def extended(base: str, **settings: Any) -> Model:
    return Model(base=base, add_tokens=AddTokens(**{"tokens": WORDS, **settings}))


def loaded(spec: Model) -> Any:
    return load_model(spec, spec.load_tokenizer())


# ---- words ------------------------------------------------------------------------------------------------------------------


def test_words_become_one_token_each_and_the_text_comes_back(bases: dict[str, str]) -> None:
    base, tokenizer = load_tokenizer("builtin:tiny"), extended(bases["llama"]).load_tokenizer()
    ids = tokenizer.encode(TEXT)[0]
    assert tokenizer.decode(ids) == TEXT
    assert len(ids) < len(base.encode(TEXT)[0])
    assert ids.count(base.vocab_size) == 3
    assert tokenizer.fingerprint != base.fingerprint
    assert differences_from_transformers(tokenizer, [TEXT, "plain words", "Nineveh"]) == []


def test_what_is_saved_is_the_same_tokenizer(bases: dict[str, str], tmp_path: Path) -> None:
    tokenizer = extended(bases["llama"]).load_tokenizer()
    tokenizer.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert (again.special, again.templates, again.adds_bos) == (tokenizer.special, tokenizer.templates, tokenizer.adds_bos)


def test_what_is_one_token_already_is_refused(bases: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="one token already: ` the`"):
        extended(bases["llama"], tokens=("the", "Nineveh")).load_tokenizer()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "found none"),
        ({"tokens": ("a",), "mine": 2}, "`tokens` and `mine`"),
        ({"tokens": ("a", " a")}, "given twice"),
        ({"tokens": ("a",), "descriptions": {"b": "c"}}, "not among the tokens"),
        ({"tokens": ("a",), "descriptions": {"a": " "}}, "says nothing of `a`"),
        ({"tokens": ("a\nb",)}, "has a line break"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        AddTokens(**settings)


def test_a_file_names_tokens_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "terms.txt"
    path.write_bytes(b"Nineveh\r\n\n quinquereme\n<end of voyage>\n")
    assert AddTokens(file=str(path)).known() == (" Nineveh", " quinquereme", "<end of voyage>")
    path.write_text("\n")
    with pytest.raises(RequestError, match="names no tokens"):
        AddTokens(file=str(path)).known()
    with pytest.raises(RequestError, match=r"model.add_tokens.file: `\S+/nowhere`: no such file or directory") as caught:
        AddTokens(file=str(tmp_path / "nowhere")).known()
    assert "Errno" not in str(caught.value)


def test_mined_words_save_exactly_what_is_said(bases: dict[str, str]) -> None:
    texts = ["the " + " ".join(["troponin troponins of dyspnoea"] * 5 + ["seldom dyspnoeic"]) + " here."] * 3
    base = load_tokenizer("builtin:tiny")
    mined = mine_tokens(count_words(texts), base, 3)
    words = tuple(token.text for token in mined)
    after = extended(bases["llama"], tokens=words).load_tokenizer()
    saved = sum(len(base.encode(text)[0]) - len(after.encode(text)[0]) for text in texts)
    assert saved == sum(token.saved for token in mined) > 0
    assert [token.saved for token in mined] == sorted((token.saved for token in mined), reverse=True)
    assert words[0] in (" troponin", " dyspnoea")


def test_strings_are_mined_where_words_have_no_spaces(bases: dict[str, str]) -> None:
    """Heart attack and dyspnoea in Chinese, among characters that change from text to text."""
    terms = ("\u5fc3\u808c\u6897\u6b7b", "\u547c\u5438\u56f0\u96be")
    texts = [f"{chr(0x4E00 + 7 * n)}{terms[0]}{chr(0x5200 + 11 * n)}{terms[1]}\u3002 two rows" for n in range(20)]
    base = load_tokenizer("builtin:tiny")
    mined = mine_tokens(count_words(texts), base, 2)
    assert {token.text for token in mined} == set(terms)
    assert AddTokens(tokens=terms).known() == terms  # nobody writes a space before them
    after = extended(bases["llama"], tokens=terms).load_tokenizer()
    saved = sum(len(base.encode(text)[0]) - len(after.encode(text)[0]) for text in texts)
    assert saved == pytest.approx(sum(token.saved for token in mined), rel=0.1)
    spaced = count_words(["\u5fc3\u808c troponin \u5fc3\u808c", "troponin rows"])
    assert spaced == {"\u5fc3\u808c": 2, " troponin": 1, " rows": 1}


def test_nothing_is_mined_where_nothing_is_saved() -> None:
    assert mine_tokens(Counter({" the": 50}), load_tokenizer("builtin:tiny"), 5) == []


# ---- rows -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_old_tokens_keep_their_logits(kind: str, bases: dict[str, str]) -> None:
    first = load_tokenizer("builtin:tiny").vocab_size
    plain, more = load_model(Model(base=bases[kind]), None), loaded(extended(bases[kind]))
    before, after = probe_logits(plain, first), probe_logits(more, first)
    assert after.shape[-1] == first + 2
    assert torch.equal(after[..., :first], before)
    assert more.config.vocab_size == first + 2
    assert (more.get_output_embeddings().weight is more.get_input_embeddings().weight) == more.config.tie_word_embeddings


def test_rows_begin_at_the_mean_of_pieces_of_a_description_or_of_all(bases: dict[str, str]) -> None:
    tokenizer = load_tokenizer("builtin:tiny")
    first = tokenizer.vocab_size
    model = loaded(extended(bases["llama"], descriptions={"Nineveh": "an old city"}))
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert torch.allclose(weight[first], weight[tokenizer.encode(" quinquereme")[0]].mean(0))
        assert torch.allclose(weight[first + 1], weight[tokenizer.encode("an old city")[0]].mean(0))
    weight = loaded(extended(bases["llama"], start="mean")).get_input_embeddings().weight
    assert torch.allclose(weight[first:], weight[:first].mean(0).expand(2, -1))


METHODS = [Lora(rank=2), Lora(rank=2, variant="dora", init="pissa"), Ia3(), BottleneckAdapter(), Prefix(prefix_length=2, init="random")]
METHODS += [Prompt(prompt_length=2, init="random"), Peft(type="oft"), Lora(rank=2, target_modules=("lm_head",)), Freeze(top_layers=1)]  # type: ignore[list-item]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_rows_train_alone_beside_a_method_and_are_found_again(method: Any, kind: str, bases: dict[str, str], tmp_path: Path) -> None:
    if kind != "llama" and getattr(method, "target_modules", None) == ("lm_head",):
        pytest.skip("a tied head takes no adapter")
    spec = extended(bases[kind])
    tokenizer = spec.load_tokenizer()
    first = tokenizer.vocab_size - 2
    module = method.attach(loaded(spec), AttachContext(seed=1, tokenizer=tokenizer))
    ids = torch.tensor([tokenizer.encode(TEXT)[0]])
    unmarked = module.eval()(input_ids=ids).logits.detach()
    let_rows_train(module, spec, method.artefact)
    assert torch.allclose(module(input_ids=ids).logits, unmarked, atol=1e-5)
    rows = {name: parameter for name, parameter in module.named_parameters() if name.endswith("added_rows")}
    assert len(rows) == (2 if kind == "llama" else 1)
    module(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and float(parameter.grad.abs().max()) > 0 for parameter in rows.values())
    with torch.no_grad():
        for parameter in rows.values():
            parameter.add_(0.3)
    trained = module(input_ids=ids).logits.detach()
    assert not torch.allclose(trained, unmarked, atol=1e-3)
    with rows_in_place(module):
        method.save(module, tmp_path)
        if method.artefact == "adapter":
            write_rows(module, spec, tmp_path)
    assert torch.equal(module(input_ids=ids).logits, trained)
    base = loaded(spec)
    old = base.get_input_embeddings().weight[:first].clone()
    read_rows(base, tmp_path)
    assert torch.equal(base.get_input_embeddings().weight[:first], old)
    again = method.load(base, tmp_path).eval()
    assert torch.allclose(again(input_ids=ids).logits, trained, atol=1e-5)
    fold_rows(module)
    assert torch.allclose(module(input_ids=ids).logits, trained, atol=1e-5)


def test_whole_matrices_train_when_asked_and_none_when_not(bases: dict[str, str]) -> None:
    found = {}
    for train in ("all", "none"):
        spec = extended(bases["llama"], train=train)
        module = Lora(rank=2).attach(loaded(spec), AttachContext(seed=1))
        let_rows_train(module, spec, "adapter")
        found[train] = {name.split(".")[-2] for name, p in module.named_parameters() if p.requires_grad and "lora" not in name}
    assert found == {"all": {"embed_tokens", "lm_head"}, "none": set()}
    with pytest.raises(RequestError, match="trains float32 weights"):
        let_rows_train(loaded(spec).bfloat16().requires_grad_(False), extended(bases["llama"], train="all"), "adapter")


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("train", ["all", "rows"])
def test_a_lora_adapter_with_new_tokens_is_the_same_model_in_plain_peft(
    train: str, kind: str, bases: dict[str, str], tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM
    from safetensors.torch import load_file

    from ftcli.exporting.open_target import open_target

    spec, method = extended(bases[kind], train=train), Lora(rank=2)
    tokenizer = spec.load_tokenizer()
    module = method.attach(loaded(spec), AttachContext(seed=1, tokenizer=tokenizer)).eval()
    let_rows_train(module, spec, method.artefact)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    with rows_in_place(module):
        method.save(module, tmp_path)
        write_rows(module, spec, tmp_path)
    tokenizer.save(tmp_path)
    ids = torch.tensor([tokenizer.encode(TEXT)[0]])
    expected = module(input_ids=ids).logits
    by_peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(by_peft(input_ids=ids).logits, expected, atol=1e-5)
    assert torch.allclose(open_target(str(tmp_path)).model(input_ids=ids).logits, expected, atol=1e-5)
    base = loaded(spec)
    read_rows(base, tmp_path)
    again = method.load(base, tmp_path).eval()
    assert torch.allclose(again(input_ids=ids).logits, expected, atol=1e-5)
    assert torch.allclose(method.merge(again)(input_ids=ids).logits, expected, atol=1e-4)
    assert "modules_to_save" not in str(list(again.state_dict()))
    assert bool(load_file(tmp_path / "added_tokens.safetensors")) == (train == "rows")  # nothing is on the disk twice


@pytest.mark.parametrize(
    ("method", "train", "is_said"),
    [
        (Lora(rank=2), "rows", False),
        (Lora(rank=2), "all", False),
        (Ia3(), "rows", True),
        (Lora(rank=2, target_modules=("lm_head",)), "all", True),
        (Lora(rank=2, extra_trained_modules=("embed_tokens", "lm_head")), "all", False),
        (Full(), "rows", False),
    ],
)
def test_a_run_says_when_plain_peft_would_load_another_model(method: Any, train: str, is_said: bool, bases: dict[str, str]) -> None:
    spec = extended(bases["llama"], train=train)
    module = method.attach(loaded(spec), AttachContext(seed=1))
    let_rows_train(module, spec, method.artefact)
    said = {change.name: change.detail for change in changes_of(inner_model(module))}
    assert ("PEFT alone would load another model" in said.get("new tokens elsewhere", "")) == is_said


def test_where_everything_trains_rows_are_no_parameter_of_their_own(bases: dict[str, str]) -> None:
    module = Full().attach(loaded(extended(bases["llama"])), AttachContext(seed=1))
    let_rows_train(module, extended(bases["llama"]), "model")
    assert not [name for name, _ in module.named_parameters() if name.endswith("added_rows")]


# ---- a run ------------------------------------------------------------------------------------------------------------------

RECIPE = """
version: 1
name: voyage
model: {{base: "{base}", add_tokens: {{mine: 2}}}}
data: {{train: [{{source: {{kind: file, path: "{rows}"}}, format: {{kind: text}}}}], holdout: 0.0}}
method: {{kind: lora, rank: 2}}
train: {{steps: 4, global_batch_size: 2, lr: 0.01}}
every: {{save: 2, keep: 9}}
output: "{output}"
"""


@pytest.fixture(scope="module")
def voyage(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that mined two tokens."""
    folder = tmp_path_factory.mktemp("voyage")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"{TEXT} {number}"}) + "\n" for number in range(4)))
    recipe = RECIPE.format(base=bases["llama"], rows=folder / "rows.jsonl", output=folder / "run")
    (folder / "recipe.yaml").write_text(recipe)
    with (folder / "words").open("w") as words:
        run_recipe(load_recipe(folder / "recipe.yaml"), Reporter(stream=words))
    return folder


def test_a_run_names_the_tokens_it_has_mined_and_what_they_save(voyage: Path) -> None:
    summary = json.loads((voyage / "run" / "manifest.json").read_text())["summary"]
    per_byte = summary["new_tokens"]["tokens_per_byte"]
    assert summary["new_tokens"]["count"] == 2
    assert per_byte["after"] < per_byte["before"]
    assert (voyage / "run" / "added_tokens.txt").read_text() == " quinquereme\n Quinqueremes\n"
    settled = load_recipe(voyage / "run" / "recipe.resolved.yaml").recipe.model.add_tokens
    assert settled is not None
    assert (settled.tokens, settled.mine) == ((" quinquereme", " Quinqueremes"), None)
    assert "new tokens" in {proof["name"] for proof in summary["proofs"] if proof["passed"]}
    assert "mined: `quinquereme` saves" in (voyage / "words").read_text()


def test_a_resumed_run_ends_with_the_same_rows(voyage: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file

    shutil.copytree(voyage / "run", tmp_path / "run")
    for path in (tmp_path / "run" / "adapter", tmp_path / "run" / "checkpoints" / "step-000004"):
        shutil.rmtree(path)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({**manifest, "summary": None}))
    begun = load_recipe(voyage / "recipe.yaml")
    moved = replace(begun, recipe=begun.recipe.model_copy(update={"output": str(tmp_path / "run")}))
    resolved = tmp_path / "run" / "recipe.resolved.yaml"
    resolved.write_text(resolved.read_text().replace(str(voyage / "run"), str(tmp_path / "run")))
    with (tmp_path / "words").open("w") as words:
        run_recipe(moved, Reporter(stream=words), resume=True)
    ours, theirs = (load_file(folder / "adapter" / "added_tokens.safetensors") for folder in (tmp_path / "run", voyage / "run"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_adapter_with_new_tokens_is_the_same_everywhere(voyage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftcli.exporting.open_target import open_target

    ours = open_target(str(voyage / "run"))
    ids = torch.tensor([ours.tokenizer.encode(TEXT)[0]])
    expected = ours.model(input_ids=ids).logits
    last = open_target(str(voyage / "run" / "checkpoints" / "step-000004")).model
    assert torch.allclose(last(input_ids=ids).logits, expected, atol=1e-5)
    alone = open_target(str(voyage / "run" / "adapter")).model
    assert torch.allclose(alone(input_ids=ids).logits, expected, atol=1e-5)
    by_peft = AutoPeftModelForCausalLM.from_pretrained(voyage / "run" / "adapter").eval()
    assert AutoTokenizer.from_pretrained(voyage / "run" / "adapter")(TEXT)["input_ids"] == ids[0].tolist()
    assert torch.allclose(by_peft(input_ids=ids).logits, expected, atol=1e-5)
    assert run(["merge", str(voyage / "run"), "-o", str(tmp_path / "merged"), "--dtype", "float32"]) == 0, capsys.readouterr().err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(TEXT)["input_ids"] == ids[0].tolist()


def test_what_its_base_must_have_keeps_an_adapter_from_others(voyage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, base = voyage / "run" / "adapter", load_recipe(voyage / "recipe.yaml").recipe.model.base
    for recipe in (
        {"merge_method": "linear", "models": [{"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}}]},
        {"merge_method": "lora_concat", "models": [{"model": str(voyage / "run"), "parameters": {"weight": 1.0}}] * 2},
    ):
        (tmp_path / "merge.yaml").write_text(json.dumps(recipe))
        assert run(["merge", str(tmp_path / "merge.yaml"), "-o", str(tmp_path / "out")]) == 2
        assert "it brings new tokens" in capsys.readouterr().err
    assert run(["generate", str(base), "--adapter", f"a={adapter}", "--use", "a", "Hm"]) == 2
    assert "it brings new tokens, and this base has none" in capsys.readouterr().err


def test_a_file_is_read_without_its_mark_and_described_by_its_own_tokens(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_bytes("\ufeffdyspnoea\nsepsis\n".encode())
    assert AddTokens(file=str(file), descriptions={"dyspnoea": "short of breath"}).known() == (" dyspnoea", " sepsis")
    with pytest.raises(RequestError, match="does not have `dyspnea`, which `descriptions` has"):
        AddTokens(file=str(file), descriptions={"dyspnea": "short of breath"}).known()


def test_a_description_of_what_is_not_mined_is_told() -> None:
    assert AddTokens(mine=3, descriptions={"zebra": "striped", "sepsis": "poisoned"}).described_in_vain([" sepsis"]) == ["zebra"]
    assert NewTokens((" sepsis",), 1.0, 0.5, (), ("zebra",)).lines()[-1] == (
        "`model.add_tokens.descriptions` has `zebra`, which is not among them"
    )
