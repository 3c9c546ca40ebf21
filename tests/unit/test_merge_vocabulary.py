"""Embeddings are merged by token, and a union of vocabularies cuts text as its parts did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.merge_models import LLAMA, llama_shapes, random_values, read_values, write_model
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


def merged(folder: Path, recipe: str, name: str = "out") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(recipe)
    merge_models(path, folder / name, verify=False)
    return folder / name


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
