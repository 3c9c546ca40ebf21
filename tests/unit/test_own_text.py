"""Replay that the base model writes itself: sampled once, bit for bit the same, and read like any other text."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ftcli.data.settings import Data
from ftcli.data.sources.file import File
from ftcli.data.sources.own_text import OwnText
from ftcli.errors import DataError
from ftcli.models.load import load_model
from ftcli.models.locate import model_folder
from ftcli.models.settings import Model
from ftcli.models.tokenizer import Tokenizer, load_tokenizer
from ftcli.recipe.recipe import Recipe
from ftcli.training import own_text
from ftcli.training.own_text import with_own_text, write_own_text

SETTINGS = OwnText(tokens=600, max_length=24, beginnings=("The ", "A "))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("builtin:tiny")


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> nn.Module:
    return load_model(Model(base="builtin:tiny"), tokenizer)


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def recipe(**source: Any) -> Recipe:
    data = {
        "train": ({"source": {"kind": "builtin", "name": "clinic"}}, {"source": {"kind": "self", **source}, "role": "replay"}),
        "evaluation": ({"source": {"kind": "builtin", "name": "stories", "split": "test"}},),
    }
    return Recipe(version=1, name="own", model=Model(base="builtin:tiny"), data=Data.model_validate(data))


def test_as_many_tokens_are_written_as_were_asked_for(model: nn.Module, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_own_text(model, tokenizer, SETTINGS, tmp_path / "self.jsonl", None)
    found = texts(tmp_path / "self.jsonl")
    lengths = [len(tokenizer.encode(text)[0]) for text in found]
    assert 600 <= sum(lengths) <= 600 + 64 * (24 + 4)
    assert max(lengths) <= 24 + 4
    assert [text.split(" ")[0] for text in found[:4]] == ["The", "A", "The", "A"]
    ended = [text for text in found if text.endswith("<|endoftext|>")]
    assert 0 < len(ended) < len(found)
    assert all("<|endoftext|>" not in text.removesuffix("<|endoftext|>") for text in found)


def test_a_text_ends_where_the_next_one_begins(model: nn.Module, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Some models write no token that ends a text, only the one that begins the next; such a text cannot be read again."""
    begins = replace(tokenizer, special={**tokenizer.special, "bos_token": "."})
    write_own_text(model, begins, SETTINGS, tmp_path / "self.jsonl", None)
    found = texts(tmp_path / "self.jsonl")
    assert found
    assert not any("." in text for text in found)


def test_a_writer_that_was_killed_goes_on_to_the_same_texts(
    model: nn.Module, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_text, "ROUND_SIZE", 8)
    write_own_text(model, tokenizer, SETTINGS, tmp_path / "whole.jsonl", None)
    original, rounds = own_text._write_round, []

    def killed_in_the_third(*arguments: Any) -> Any:
        rounds.append(arguments[4])
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(own_text, "_write_round", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        write_own_text(model, tokenizer, SETTINGS, tmp_path / "parts.jsonl", None)
    with (tmp_path / "parts.partial").open("a") as file:
        file.write('[2, 17, ["cut in the mid')
    write_own_text(model, tokenizer, SETTINGS, tmp_path / "parts.jsonl", None)
    assert rounds[:4] == [0, 1, 2, 2]
    assert texts(tmp_path / "parts.jsonl") == texts(tmp_path / "whole.jsonl")
    assert not (tmp_path / "parts.partial").exists()


def test_what_is_written_is_found_again_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS.model_dump(mode="python", exclude={"kind"})
    data, notes = with_own_text(recipe(**settings), tmp_path, None)
    source = data.train[1].source
    assert isinstance(source, File)
    assert source.label() == "self"
    assert "600 tokens that builtin:tiny wrote itself" in notes[0]
    monkeypatch.setattr(own_text._Writer, "_loaded", lambda self: pytest.fail("the model is loaded again"))
    assert with_own_text(recipe(**settings), tmp_path, None)[0] == data
    with pytest.raises(pytest.fail.Exception):
        with_own_text(recipe(**settings | {"seed": 5}), tmp_path, None)


@pytest.mark.parametrize("changed", [{"rope_theta": 77.0}, {"rms_norm_eps": 0.1}], ids=str)
def test_another_configuration_writes_other_texts(changed: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder("builtin:tiny"), base)
    settings = {"tokens": 100, "max_length": 16, "beginnings": ("The ",)}

    def written() -> str:
        document = recipe(**settings)
        document = document.model_copy(update={"model": Model(base=str(base))})
        source = with_own_text(document, tmp_path, None)[0].train[1].source
        assert isinstance(source, File)
        return source.path

    before = written()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "_name_or_path": "elsewhere"}, indent=7))
    assert written() == before
    if "rope_theta" in changed and "rope_parameters" in config:
        changed = {"rope_parameters": {**config["rope_parameters"], **changed}}
    (base / "config.json").write_text(json.dumps(config | changed))
    assert written() != before
    assert texts(Path(written())) != texts(Path(before))


def test_a_smoke_run_writes_little(tmp_path: Path) -> None:
    data, _ = with_own_text(recipe(tokens=10_000_000, beginnings=("The ",)), tmp_path, None, first_rows=4)
    source = data.train[1].source
    assert isinstance(source, File)
    assert len(texts(Path(source.path))) < 80


def test_without_a_recipe_s_model_there_are_no_rows() -> None:
    with pytest.raises(DataError, match="written by the base model of a training recipe"):
        next(OwnText().rows())
