"""Embeddings are merged by token, and a union of vocabularies cuts text as its parts did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.merge_models import LLAMA, llama_shapes, merged, random_values, read_values, write_model, write_tensors
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ftcli.errors import RecipeError
from ftcli.merging.outcome import merge_models
from ftcli.merging.tokens import combined, read_tokens

TEXTS = {"a": ["the lamp the lamp the tree"] * 20, "b": ["sehr gut sehr gut lampe der baum"] * 20}


def bpe(folder: Path, texts: list[str], special: list[str], size: int = 290) -> dict[str, int]:
    """A byte-level BPE tokenizer in `folder`; its tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    found: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return found


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Models `a` and `b` with vocabularies of their own."""
    for seed, (name, special) in enumerate({"a": ["<s>", "</s>"], "b": ["<pad>", "<s>", "</s>", "<tool>"]}.items()):
        scratch = tmp_path / f"scratch-{name}"
        tokens = bpe(scratch, TEXTS[name], special)
        config = {**LLAMA, "vocab_size": len(tokens), "bos_token_id": tokens["<s>"], "eos_token_id": tokens["</s>"]}
        write_model(tmp_path / name, random_values(llama_shapes(config), seed), config, dtype="F32")
        (scratch / "tokenizer.json").rename(tmp_path / name / "tokenizer.json")
    return tmp_path


def ids(folder: Path) -> dict[str, int]:
    return dict(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True))


LINEAR = "merge_method: linear\nbase_model: a\nmodels: [a, b]\nparameters: {{weight: 1}}\ntokenizer: {}\n"


@pytest.mark.parametrize("source", ["base", "b", "union", "intersection"])
def test_rows_are_matched_by_token(source: str, two: Path) -> None:
    out = merged(two, LINEAR.format(f"{{source: {source}}}"))
    a, b, found = ids(two / "a"), ids(two / "b"), ids(out)
    expected = {"base": set(a), "b": set(b), "union": set(a) | set(b), "intersection": (set(a) & set(b)) | {"<s>", "</s>"}}[source]
    assert set(found) == expected
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == len(found)
    assert config["bos_token_id"] == found["<s>"]
    rows, first, second = (read_values(folder) for folder in (out, two / "a", two / "b"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert rows[name].shape[0] == len(found)
        for token, row in found.items():
            one = first[name][a[token]] if token in a else second[name][b[token]]
            other = second[name][b[token]] if token in b else first[name][a[token]]
            np.testing.assert_allclose(rows[name][row], (one + other) / 2, atol=1e-6)


def test_a_union_cuts_text_as_its_parts_did(two: Path) -> None:
    out = merged(two, LINEAR.format("{source: union}"))
    parts = {name: Tokenizer.from_file(str(two / name / "tokenizer.json")) for name in "ab"}
    union = Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in ("the lamp the tree", "lamp tree"):
        assert union.encode(text).tokens == parts["a"].encode(text).tokens
    # what only the second knows is one token again, and not cut out of longer words
    assert union.encode("sehr gut").tokens == parts["b"].encode("sehr gut").tokens
    assert "".join(union.encode("unsehrig").tokens) == "unsehrig"
    document = json.loads((out / "tokenizer.json").read_text())
    assert [token["content"] for token in document["added_tokens"]] == ["<s>", "</s>", "<pad>", "<tool>"]


def test_single_tokens_and_padding_as_the_recipe_says(two: Path) -> None:
    rules = "{source: base, pad_to_multiple_of: 16, tokens: {<new>: {source: {kind: zero}}, <s>: {source: b, force: true}, "
    rules += "<other>: {source: {kind: model_token, model: b, token: <tool>}}}}"
    out = merged(two, LINEAR.format(rules))
    a, b, found = ids(two / "a"), ids(two / "b"), ids(out)
    rows, second = read_values(out)["model.embed_tokens.weight"], read_values(two / "b")["model.embed_tokens.weight"]
    assert rows.shape[0] % 16 == 0
    assert len(found) == len(a) + 2
    assert not rows[found["<new>"]].any()
    np.testing.assert_allclose(rows[found["<other>"]], second[b["<tool>"]], atol=1e-6)
    np.testing.assert_allclose(rows[found["<s>"]], second[b["<s>"]], atol=1e-6)
    assert np.isfinite(rows).all()
    assert rows[-1].any()


def test_vocabularies_that_cut_text_differently_are_refused(two: Path) -> None:
    path = two / "b" / "tokenizer.json"
    document = json.loads(path.read_text())
    document["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(document))
    with pytest.raises(RecipeError, match="cut text differently"):
        merged(two, LINEAR.format("{source: union}"))
    with pytest.raises(RecipeError, match="has no token `<missing>`"):
        merged(two, LINEAR.format("{source: base, tokens: {<x>: {source: {model: b, token: <missing>}}}}"))


def test_a_union_with_itself_is_itself(two: Path) -> None:
    table: Any = read_tokens(two / "a")
    again: Any = combined(table, [table, table], "union")
    assert again.ids == table.ids
    assert again.document == table.document
    assert combined(table, [table], "intersection").document == table.document  # type: ignore[union-attr]


def test_rows_that_mean_other_tokens_are_a_warning(two: Path) -> None:
    from ftcli.merging.plan import plan_merge
    from ftcli.merging.recipe import load_merge_recipe

    tokens = ids(two / "a")
    config = {**LLAMA, "vocab_size": len(tokens)}
    write_model(two / "c", random_values(llama_shapes(config), 7), config, dtype="F32")
    document = (two / "a" / "tokenizer.json").read_text().replace('"<s>"', '"<q>"')
    (two / "c" / "tokenizer.json").write_text(document)
    path = two / "recipe.yaml"
    path.write_text("merge_method: linear\nmodels: [a, c]\nparameters: {weight: 1}\n")
    assert "1 are in the second only" in plan_merge(load_merge_recipe(path)).warnings[0]


@pytest.mark.parametrize(
    ("template", "expected"), [("chatml", "<|im_start|>"), ("llama3", "<|eot_id|>"), ("'{{ x }}'", "{{ x }}"), ("auto", "OWN")]
)
def test_the_chat_template_is_the_one_asked_for(template: str, expected: str, two: Path) -> None:
    for name in "ab":
        (two / name / "chat_template.jinja").write_text("OWN")
    out = merged(two, LINEAR.format("{source: base}") + f"chat_template: {template}\n")
    assert expected in (out / "chat_template.jinja").read_text()


def test_a_union_says_how_much_of_a_text_it_cuts_as_each_model_did(two: Path) -> None:
    """Counted here token by token, on the stories that the merge reads."""
    import gzip

    from ftcli.builtin.catalogue import dataset_path

    (two / "union.yaml").write_text(LINEAR.format("{source: union}"))
    outcome = merge_models(two / "union.yaml", two / "union", verify=False)
    union = Tokenizer.from_file(str(two / "union" / "tokenizer.json"))
    with gzip.open(dataset_path("stories", "test"), "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file][:200]
    shares = []
    for name in "ab":
        own = Tokenizer.from_file(str(two / name / "tokenizer.json"))
        cuts = [(set(union.encode(text).offsets), own.encode(text).offsets) for text in texts]
        shares.append(sum(place in found for found, theirs in cuts for place in theirs) / sum(len(theirs) for _, theirs in cuts))
    assert min(shares) < 1
    said = [warning for warning in outcome.warnings if "alike" in warning]
    expected = [
        f"`{name}`: the union cuts {100 * share:.1f} % of its tokens" for name, share in zip("ab", shares, strict=True) if share < 1
    ]
    assert len(said) == len(expected)
    assert all(line.startswith(start) for line, start in zip(said, expected, strict=True))
    assert json.loads((two / "union" / "manifest.json").read_text())["warnings"] == list(outcome.warnings)
    (two / "own.yaml").write_text(LINEAR.format("{source: base}"))
    assert not [warning for warning in merge_models(two / "own.yaml", two / "own", verify=False).warnings if "alike" in warning]


WORDS = ["<s>", "</s>", "<pad>", *(f"w{i}" for i in range(9))]
MEAN = "merge_method: linear\nmodels: [{}]\nparameters: {{weight: 1}}\ntokenizer: {}\n"


def named(folder: Path, words: list[str]) -> None:
    """A tokenizer whose tokens are these words."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def model_of(folder: Path, words: list[str], seed: int, *, rows: int | None = None, bias: bool = False, **config: Any) -> dict[str, Any]:
    """A model whose tokens are these words, with a bias at its head where that is asked for; its numbers."""
    settings = {**LLAMA, "num_hidden_layers": 1, "vocab_size": rows or len(words), **config}
    shapes = llama_shapes(settings) | ({"lm_head.bias": (settings["vocab_size"],)} if bias else {})
    values = random_values(shapes, seed)
    write_model(folder, values, settings, dtype="F32")
    named(folder, words)
    return values


def by_token(rows: Any, words: list[str]) -> dict[str, Any]:
    """Each token's row, or entry of a vector."""
    return {word: rows[number] for number, word in enumerate(words)}


@pytest.mark.parametrize("source", ["base", "union", "b"])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_the_bias_of_a_head_follows_its_tokens(source: str, method: str, tmp_path: Path) -> None:
    """Against sums over a dictionary of tokens; the first token of one model is the last of the other, with more tokens behind."""
    words, others = WORDS, [*reversed(WORDS), "y0", "y1"]
    first, second = model_of(tmp_path / "a", words, 0, bias=True), model_of(tmp_path / "b", others, 1, bias=True)
    recipe = LINEAR if method == "linear" else LINEAR.replace("linear", "ties").replace("[a, b]", "[b]")
    out = merged(tmp_path, recipe.format(f"{{source: {source}}}"))
    found, rows = ids(out), read_values(out)
    assert len(found) == len(words if source == "base" else others)
    for name in ("lm_head.bias", "lm_head.weight", "model.embed_tokens.weight"):
        one, other = by_token(first[name], words), by_token(second[name], others)
        assert len(rows[name]) == len(found)
        for token, row in found.items():
            expected = other[token] if method == "ties" else (one.get(token, other[token]) + other[token]) / 2
            np.testing.assert_allclose(rows[name][row], expected, atol=1e-6)


def test_a_phi_with_the_bias_of_its_head_is_permuted_padded_and_runs(tmp_path: Path) -> None:
    from transformers import PhiConfig, PhiForCausalLM

    orders = {"a": WORDS, "b": WORDS[::-1]}
    for name, words in orders.items():
        model = PhiForCausalLM(PhiConfig(vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2))
        model.lm_head.bias.data.normal_()
        model.save_pretrained(tmp_path / name)
        named(tmp_path / name, words)
    (tmp_path / "r.yaml").write_text(MEAN.format("a, b", "{source: base, pad_to_multiple_of: 8}"))
    outcome = merge_models(tmp_path / "r.yaml", tmp_path / "out")
    assert [proof.passed for proof in outcome.proofs] == [True, True]
    first, second = (read_values(tmp_path / name)["lm_head.bias"] for name in "ab")
    bias = read_values(tmp_path / "out")["lm_head.bias"]
    np.testing.assert_allclose(bias[:12], (first + second[::-1]) / 2, atol=1e-6)
    np.testing.assert_allclose(bias[12:], (first.mean() + second.mean()) / 2, atol=1e-6)


def test_a_reader_never_leaves_its_tensor(tmp_path: Path) -> None:
    from ftcli.merging.readers import StoredReader
    from ftcli.merging.stored import OpenFiles, folder_tensors

    model_of(tmp_path / "a", WORDS, 0, bias=True)
    tensors = folder_tensors(tmp_path / "a")
    with OpenFiles() as files:
        for name, by_entry, num_rows in (("lm_head.bias", False, 1), ("lm_head.bias", True, 12), ("lm_head.weight", True, 12)):
            reader = StoredReader(tensors[name], files, by_entry=by_entry)
            assert reader.rows(num_rows - 1, num_rows).shape[0] == 1
            for first, last in ((num_rows, num_rows + 1), (-1, 1), (1, 0)):
                with pytest.raises(AssertionError):
                    reader.rows(first, last)
                with pytest.raises(AssertionError):
                    reader.stored(first, last)


def test_fisher_weighs_each_token_by_its_own_statistics(tmp_path: Path) -> None:
    """Against the weighted mean of the rows in one order."""
    values = {"a": model_of(tmp_path / "a", WORDS, 0, bias=True), "b": model_of(tmp_path / "b", WORDS[::-1], 1, bias=True)}
    statistics = {}
    for seed, (name, own) in enumerate(values.items(), 5):
        statistics[name] = {key: np.abs(value) for key, value in random_values({k: v.shape for k, v in own.items()}, seed).items()}
        write_tensors(tmp_path / f"{name}.safetensors", {key: ("F32", value) for key, value in statistics[name].items()})
    entries = ", ".join(f"{{model: {name}, statistics: {name}.safetensors}}" for name in values)
    out = merged(tmp_path, f"merge_method: fisher\nmodels: [{entries}]\ntokenizer: {{source: base}}\n")
    found = read_values(out)
    for name in ("lm_head.bias", "lm_head.weight"):
        order = slice(None, None, -1)
        shares = statistics["a"][name], statistics["b"][name][order]
        expected = (shares[0] * values["a"][name] + shares[1] * values["b"][name][order]) / (shares[0] + shares[1])
        np.testing.assert_allclose(found[name], expected, atol=1e-5)


def special(folder: Path, **tokens: str | None) -> None:
    """What the tokenizer calls its special tokens."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **tokens}))


def test_special_ids_whose_token_is_gone_are_the_chosen_tokenizers_own(tmp_path: Path) -> None:
    chosen = ["None", *(f"x{i}" for i in range(9)), "<|end|>", "<pad>"]
    model_of(tmp_path / "a", WORDS, 0, bos_token_id=0, eos_token_id=[1, 3], pad_token_id=2, sep_token_id=4)
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 2, "top_k": 3}))
    # the configuration of the chosen model is a default that nobody has set: its tokenizer knows better
    model_of(tmp_path / "c", chosen, 1, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    special(tmp_path / "c", eos_token="<|end|>", sep_token=None)
    (tmp_path / "r.yaml").write_text(MEAN.format("a, c", "{source: c}"))
    outcome = merge_models(tmp_path / "r.yaml", tmp_path / "out", verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: value for key, value in config.items() if key.endswith("_token_id")} == {
        "bos_token_id": 1,
        "eos_token_id": 10,
        "pad_token_id": 11,
        "sep_token_id": None,
    }
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": 10, "pad_token_id": 11, "top_k": 3}
    (said,) = [warning for warning in outcome.warnings if "special tokens" in warning]
    assert "`eos_token_id` was `</s>`, `w0` and is `<|end|>` now" in said
    assert "`sep_token_id` was `w1` and is nothing now" in said
    assert "pad" not in said


def test_a_list_of_ends_keeps_those_that_are_there(tmp_path: Path) -> None:
    chosen = [*(f"x{i}" for i in range(9)), "</s>", "<|end|>", "<s>"]
    model_of(tmp_path / "a", WORDS, 0, bos_token_id=0, eos_token_id=[1, 3])
    model_of(tmp_path / "c", chosen, 1, bos_token_id=11, eos_token_id=[10, 9])
    out = merged(tmp_path, MEAN.format("a, c", "{source: c}"))
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (11, [9])
    model_of(tmp_path / "b", [word.replace("</s>", "v1").replace("w0", "v2") for word in WORDS], 2, eos_token_id=[1, 3], bos_token_id=0)
    again = json.loads((merged(tmp_path, MEAN.format("b, c", "{source: c}"), "two") / "config.json").read_text())
    assert again["eos_token_id"] == [10, 9]


@pytest.mark.parametrize("source", ["union", "c", "base"])
def test_a_token_that_a_model_has_not_is_the_mean_of_those_that_have_it(source: str, tmp_path: Path) -> None:
    """Without a base; against sums over a dictionary of tokens."""
    orders = {"a": WORDS, "b": [*WORDS[3:], "y0"], "c": ["<s>", *WORDS[5:], "y0", "z0"]}
    tables = {
        name: by_token(model_of(tmp_path / name, words, seed)["lm_head.weight"], words) for seed, (name, words) in enumerate(orders.items())
    }
    out = merged(tmp_path, MEAN.format("a, b, c", f"{{source: {source}}}"))
    rows = read_values(out)["lm_head.weight"]
    for token, row in ids(out).items():
        have = [table[token] for table in tables.values() if token in table]
        own = [table.get(token, np.mean(have, axis=0)) for table in tables.values()]
        np.testing.assert_allclose(rows[row], np.mean(own, axis=0), atol=1e-6)


def test_a_token_that_no_model_has_a_row_for_gets_the_mean_row(tmp_path: Path) -> None:
    more = [*WORDS, "z0", "z1"]
    values = [model_of(tmp_path / name, more, seed, rows=12)["lm_head.weight"] for seed, name in enumerate("ab")]
    (tmp_path / "r.yaml").write_text(MEAN.format("a, b", "{source: union, tokens: {z1: {source: {kind: zero}}}}"))
    outcome = merge_models(tmp_path / "r.yaml", tmp_path / "out", verify=False)
    rows = read_values(tmp_path / "out")["lm_head.weight"]
    np.testing.assert_allclose(rows[12], (values[0].mean(axis=0) + values[1].mean(axis=0)) / 2, atol=1e-6)
    assert not rows[13].any()
    assert [warning for warning in outcome.warnings if "row" in warning] == [
        "no model has a row for `z0`: they get the mean row, which says nothing of them"
    ]


def test_a_vocabulary_that_cannot_be_made_is_one_problem(tmp_path: Path) -> None:
    model_of(tmp_path / "a", WORDS, 0)
    model_of(tmp_path / "b", [f"x{i}" for i in range(14)], 1)
    with pytest.raises(RecipeError) as caught:
        merged(tmp_path, MEAN.format("a, b", "{source: intersection}"))
    assert [problem.what for problem in caught.value.problems] == ["the tokenizers have no token in common"]
