"""Texts with labels, from rows to batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftcli.data.formats.detect import detect_format
from ftcli.data.formats.label import Label
from ftcli.data.formats.text import Text
from ftcli.data.prepare import prepare
from ftcli.data.settings import Data, TrainSource
from ftcli.data.sources.file import File
from ftcli.errors import DataError
from ftcli.models.tokenizer import Tokenizer, load_tokenizer
from ftcli.recipe.load import load_recipe

LABELLED = frozenset({"label"})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("builtin:tiny")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a", "label": "x"}, Label()),
        ({"text": "a", "labels": ["x", "y"]}, Label(label="labels")),
        ({"sentence": "a", "label": 1}, Label(text="sentence")),
        ({"text": "a", "text_pair": "b", "label": 1}, Label(text_pair="text_pair")),
        ({"text": "a", "label": "x", "prompt": "p", "completion": "c"}, Label()),
    ],
)
def test_a_labelled_row_is_found_by_its_columns_where_labels_are_wanted(row: dict[str, Any], expected: Label) -> None:
    assert detect_format([row], kinds=LABELLED) == expected


def test_a_labelled_row_is_a_text_to_a_language_model() -> None:
    assert detect_format([{"text": "a", "label": "x"}]) == Text()


def test_rows_without_labels_are_no_data_for_a_classifier() -> None:
    with pytest.raises(DataError, match=r"formats and their columns: label \(text, label\)"):
        detect_format([{"story": "a"}], "stories", kinds=LABELLED)


@pytest.mark.parametrize(
    ("value", "labels"),
    [("good", ("good",)), (" good ", ("good",)), (3, ("3",)), (0.1, ("0.1",)), (True, ("true",)), (["b", "a"], ("b", "a")), ([], ())],
)
def test_a_label_is_a_text_a_number_or_a_list_of_them(value: Any, labels: tuple[str, ...], tokenizer: Tokenizer) -> None:
    assert Label().example({"text": "a", "label": value}, tokenizer, "row 1").labels == labels


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"text": "a"}, "column `label` is not there"),
        ({"text": "a", "label": None}, "column `label` is null, not a label"),
        ({"text": "a", "label": ""}, "column `label` is empty, not a label"),
        ({"text": "a", "label": {"x": 1}}, "column `label` is an object, not a label"),
        ({"text": "a", "label": float("nan")}, "column `label` is `nan`, not a label"),
        ({"text": "  ", "label": "x"}, "column `text` is empty"),
        ({"text": 5, "label": "x"}, "column `text` is a number, not a text"),
    ],
)
def test_a_row_without_text_or_label_is_refused(row: dict[str, Any], error: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=error):
        Label().example(row, tokenizer, "row 1")


def text_of(settings: Label, row: dict[str, Any], tokenizer: Tokenizer) -> str:
    return settings.example(row, tokenizer, "row 1").segments[0].text


def test_a_template_is_filled_once_and_braces_in_the_text_stay(tokenizer: Tokenizer) -> None:
    row = {"text": "{text_pair} {x}", "b": "second", "label": "x"}
    settings = Label(text_pair="b", template='{{"q": "{text}"}} {text_pair}:')
    assert text_of(settings, row, tokenizer) == '{{"q": "{text_pair} {x}"}} second:'


def test_a_pair_without_a_template_stands_in_two_lines(tokenizer: Tokenizer) -> None:
    assert text_of(Label(text_pair="b"), {"text": "first", "b": "second", "label": 1}, tokenizer) == "first\nsecond"


def test_a_template_without_the_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"allowed: a text with `\{text\}` in it"):
        Label(template="Opinion:")


def test_an_encoder_gets_its_own_tokens_around_the_text(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer(tmp_path)
    assert text_of(Label(), {"text": "a", "label": 1}, tokenizer) == "[CLS]a[SEP]"
    assert text_of(Label(text_pair="b"), {"text": "a", "b": "c", "label": 1}, tokenizer) == "[CLS]a[SEP]c[SEP]"


def bert_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer of words with BERT's special tokens."""
    import tokenizers
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    backend = tokenizers.Tokenizer(WordLevel({token: index for index, token in enumerate([*special.values(), "a", "b", "c"])}, "[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.add_special_tokens(list(special.values()))
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "config.json").write_text("{}")
    return load_tokenizer(str(folder))


def prepared(rows: list[dict[str, Any]], folder: Path, tokenizer: Tokenizer, **settings: Any) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(train=(TrainSource(source=File(path=str(path)), format=Label()),), holdout=0.0, **settings)
    return prepare(data, tokenizer, cache_folder=folder / "cache", formats=LABELLED)


def test_labels_and_weights_survive_the_cache(tmp_path: Path, tokenizer: Tokenizer) -> None:
    labels: list[Any] = ["naïve \U0001f600", ["a", "b"], [], 2.5, "plain"]
    rows = [{"text": f"text {index}", "label": label, "weight": 0.5 + index} for index, label in enumerate(labels)]
    for hit in (False, True):
        store = prepared(rows, tmp_path, tokenizer).train[0]
        assert store.report.cache_hit is hit
        assert [store.tree(index).labels for index in range(5)] == [("naïve \U0001f600",), ("a", "b"), (), ("2.5",), ("plain",)]
        assert [float(store.tree(index).spans["weight"][0]) for index in range(5)] == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert store.report.num_targets == 5


def test_trees_of_other_formats_have_no_labels(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a story"}\n')
    data = Data(train=(TrainSource(source=File(path=str(path)), format=Text()),), holdout=0.0)
    assert prepare(data, tokenizer, cache_folder=tmp_path / "cache").train[0].tree(0).labels is None


def test_a_row_of_weight_0_is_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = prepared([{"text": "a", "label": "x", "weight": 0}, {"text": "b", "label": "y"}], tmp_path, tokenizer).train[0]
    assert len(store) == 1
    assert store.report.dropped == {"no target": 1}


def test_a_long_text_is_refused_cut_or_dropped_and_never_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": "word " * 50, "label": "x"}, {"text": "a", "label": "y"}]
    for policy in ("error", "split", "auto"):
        with pytest.raises(DataError, match=r"longer than `data.max_length` \(20\)"):
            prepared(rows, tmp_path, tokenizer, max_length=20, on_overflow=policy)
    assert len(prepared(rows, tmp_path, tokenizer, max_length=20, on_overflow="drop").train[0]) == 1
    cut = prepared(rows, tmp_path, tokenizer, max_length=20, on_overflow="truncate_prompt").train[0].tree(0)
    assert len(cut) == 20
    assert cut.labels == ("x",)


def test_a_label_format_under_a_language_model_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n')
    data = Data(train=(TrainSource(source=File(path=str(path)), format=Label()),), holdout=0.0)
    with pytest.raises(DataError, match="format `label` is not one that the objective learns from"):
        prepare(data, tokenizer, cache_folder=tmp_path / "cache")


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "num_labels"), [("banking77_train", 77), ("clinc150_small_train", 150), ("snips_train", 7), ("sentence_polarity", 2)]
)
def test_real_labels_are_read(name: str, num_labels: int, shared: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    recipe = {
        "version": 1,
        "name": "real",
        "model": {"base": "builtin:tiny"},
        "data": {"train": [{"source": {"kind": "file", "path": str(shared / "data" / f"{name}.jsonl")}}], "max_length": 512},
        "objective": {"kind": "classification"},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    loaded = load_recipe(tmp_path / "r.yaml").recipe
    stores = prepare(loaded.data, tokenizer, cache_folder=tmp_path / "cache", formats=loaded.objective.formats)
    settled = loaded.objective.settled(stores.train, stores.evaluation, tokenizer)
    assert settled.head is not None
    assert len(settled.head.labels) == num_labels
    assert list(settled.head.labels) == sorted(settled.head.labels)
