"""Lengths, repeats, languages and overlap of a data set are what counting by hand gives."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ftcli.cli import main
from ftcli.data.leakage import Text, find_leakage
from ftcli.data.select import pool as pool_module
from ftcli.data.select.pool import Pool, open_sources
from ftcli.data.stats.languages import language_finder, script_of
from ftcli.data.stats.measure import Lengths, measure
from ftcli.data.stats.near import RepeatFinder
from ftcli.data.stats.overlap import HeldOut
from ftcli.errors import DataError, MissingExtraError
from ftcli.models.tokenizer import load_tokenizer

WORDS = ["river", "stone", "amber", "lantern", "quiet", "market", "copper", "window", "garden", "thunder", "velvet", "harbour", "winter"]


def sentences(count: int, seed: int, words: int = 16) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choice(WORDS) + str(generator.randrange(100)) for _ in range(words)) for _ in range(count)]


def as_pool(path: Path, texts: Sequence[str]) -> Pool:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Pool(open_sources([str(path)]))


def one_word_changed(line: str) -> str:
    words = line.split()
    words[len(words) // 2] = "elsewhere"
    return " ".join(words)


def test_lengths_are_counted_by_row() -> None:
    lengths = Lengths()
    lengths.add([3, 1, 2])
    lengths.add([4])
    found = lengths.to_json()
    assert (found["total"], found["mean"], found["longest"]) == (10, 2.5, 4)
    assert (found["1%"], found["50%"], found["75%"], found["99%"]) == (1, 2, 3, 4)


def test_long_texts_are_counted_to_three_digits() -> None:
    lengths = Lengths()
    lengths.add([9_999, 12_345, 12_399, 7_654_321])
    assert dict(lengths.counts) == {9_999: 1, 12_300: 2, 7_650_000: 1}
    assert lengths.total == 9_999 + 12_345 + 12_399 + 7_654_321
    assert lengths.longest == 7_654_321


def test_repeats_are_counted_once_by_the_first_kind_that_fits() -> None:
    rows = sentences(300, 1)
    planted = [rows[0], rows[0], rows[1].upper() + "!", one_word_changed(rows[2]), "", "", "  "]
    finder = RepeatFinder()
    for start in range(0, len(rows), 64):
        finder.add(rows[start : start + 64])
    finder.add(planted)
    found = finder.found()
    assert (found.exact, found.same_words, found.near) == (2, 1, 1)


def test_near_rows_are_those_of_the_audit(shared: Path) -> None:
    rows = [json.loads(line)["text"] for line in (shared / "data/clinc150_small_train.jsonl").read_text().split("\n")[:600]]
    finder = RepeatFinder()
    finder.add(rows)
    exact = [hit for hit in find_leakage([Text(str(place), row, "") for place, row in enumerate(rows)], []).repeated if hit.kind == "near"]
    # the audit counts n-grams out, and also rows of which one word differs; MinHash estimates
    expected = sum(hit.share >= 0.6 for hit in exact)
    assert expected > 10
    assert finder.found().near == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(
    ("text", "script"),
    [("Straße", "Latin"), ("Быть или не быть, ok", "Cyrillic"), ("你好世界", "Han"), ("नमस्ते", "Devanagari"), ("12 + 3 = 15", "no letters")],
)
def test_scripts(text: str, script: str) -> None:
    assert script_of(text) == script


def test_languages_need_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(MissingExtraError, match=r'pip install "ftcli\[langid\]"'):
        language_finder()


@pytest.mark.skipif(importlib.util.find_spec("py3langid") is None, reason="the extra `langid` is not installed")
def test_languages_are_told_apart() -> None:
    language_of = language_finder()
    texts = ["The cat sat on the mat and looked at us.", "Die Katze saß auf der Matte und sah uns an.", "Le chat était assis sur le tapis."]
    assert [language_of(text) for text in [*texts, "12"]] == ["en", "de", "fr", "no letters"]


def test_all_is_measured_in_one_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "CHUNK_ROWS", 3)
    rows = ["Once there was a fox.", "Été, naïve ☃", "", "Once there was a fox.", "Привет"]
    tokenizer = load_tokenizer("builtin:tiny")
    found = measure(as_pool(tmp_path / "rows.jsonl", rows), tokenizer=tokenizer)
    assert found.num_rows == 5
    assert found.num_empty == 1
    assert found.num_bytes == sum(len(row.encode()) for row in rows)
    assert found.characters.total == sum(map(len, rows))
    num_tokens = sum(len(tokenizer.encode(row)[0]) for row in rows)
    assert found.tokens is not None
    assert found.tokens.total == num_tokens
    assert found.tokens_per_byte == num_tokens / found.num_bytes
    assert found.repeats.exact == 1
    assert dict(found.languages) == {"Latin": 3, "Cyrillic": 1}


def test_evaluation_rows_are_found_whole_quoted_and_not_at_all() -> None:
    long, short = sentences(1, 2, words=30)[0], "Which way is north?"
    held_out = HeldOut([long, short, sentences(1, 3)[0], "  "])
    words = long.split()
    texts = [
        f"He read: {long.upper()} - and left.",
        " ".join(words[:26]),  # 14 of the 18 n-grams: below four fifths
        " ".join(words[:28]),
        "which way IS north",
        "Tell me, which way is north?",  # a row of four words is found as a whole text only
        "",
    ]
    assert held_out.find(texts) == [[0], [], [0], [1], [], []]
    assert held_out.held_by(texts).tolist() == [True, False, True, True, False, False]


def test_overlap_agrees_with_the_audit() -> None:
    generator = random.Random(4)
    held_out, others = sentences(40, 5, words=14), sentences(60, 6, words=20)
    texts = [f"{other} {row.title()}" if generator.random() < 0.3 else other for row, other in zip(held_out * 2, others, strict=False)]
    found = {row for rows in HeldOut(held_out).find(texts) for row in rows}
    audit = find_leakage(
        [Text(f"t{place}", text, "") for place, text in enumerate(texts)], [Text(str(place), row, "") for place, row in enumerate(held_out)]
    )
    assert found == {int(hit.where) for hit in audit.leaked if hit.kind != "near"}
    assert len(found) > 5


def test_files_without_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(DataError):
        measure(Pool(open_sources([str(tmp_path / "rows.jsonl")])))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    as_pool(tmp_path / "rows.jsonl", [*sentences(30, 7), sentences(30, 7)[0]])
    return tmp_path / "rows.jsonl"


def test_the_command_prints_a_table_or_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_pool(file.parent / "test.jsonl", sentences(2, 7))
    arguments = ["data", "stats", str(file), "--tokenizer", "builtin:tiny", "--evaluation", str(file.parent / "test.jsonl")]
    assert main.run(arguments) == 0
    words = capsys.readouterr().out
    assert "31 rows" in words
    assert "1 (3.2%) exactly" in words
    assert "2 of 2 rows of test stand in the data\n  test.jsonl:1  in  rows.jsonl:1" in words
    assert main.run([*arguments, "--json", "--no-near"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["repeats"] == {"exact": 1, "same_words": 0, "near": None}
    assert found["overlap"][0]["found"] == 2
    assert np.isclose(found["tokens_per_byte"], found["tokens"]["total"] / found["bytes"])


def test_lengths_are_drawn(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [file.parent / "a.svg", file.parent / "b.svg"]
    for picture in pictures:
        assert main.run(["data", "stats", str(file), "--plot", str(picture), "--no-near"]) == 0
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert b"length of a text" in pictures[0].read_bytes()
    assert main.run(["data", "stats", str(file), "--plot", "lengths.gif"]) == 2
    assert "neither .svg nor .png" in capsys.readouterr().err
