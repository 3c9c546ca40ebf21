"""Planted rows are found by every way; rows are copied as they stand; what is chosen depends on texts and seed alone."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftcli.cli import main
from ftcli.data.select import pool as pool_module
from ftcli.data.select.best import Best, Sample, Spread
from ftcli.data.select.difference import NgramModels
from ftcli.data.select.doubts import Evidence, doubts
from ftcli.data.select.importance import Bag, Importance, kl, shares_of
from ftcli.data.select.models import TextModel
from ftcli.data.select.neighbours import Neighbours, clusters_of, whitening
from ftcli.data.select.pool import Pool, open_sources
from ftcli.data.select.run import Selection, select
from ftcli.data.select.words import WordReader, Words, digests_of, uniform
from ftcli.errors import DataError, UsageError

SEA = ["ship", "sail", "harbour", "captain", "anchor", "wave", "sailor", "storm", "deck", "island", "compass", "rope"]
FARM = ["cow", "field", "tractor", "farmer", "barn", "wheat", "harvest", "fence", "goat", "plough", "hay", "orchard"]
PLAIN = ["the", "a", "is", "was", "old", "new", "and", "saw", "near", "big", "small", "went", "to", "with", "it", "they"]


def sentences(words: Sequence[str], count: int, seed: int) -> list[str]:
    """Sentences of which a third of the words are of the domain."""
    generator = random.Random(seed)
    return [" ".join(generator.choice(words if place % 3 == 2 else PLAIN) for place in range(15)) for _ in range(count)]


def write(path: Path, texts: Sequence[str], **columns: Any) -> Path:
    path.write_text("".join(json.dumps({"text": text, **columns}) + "\n" for text in texts), encoding="utf-8")
    return path


def as_pool(*paths: Path) -> Pool:
    return Pool(open_sources([str(path) for path in paths]))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """(task set about the sea, pool in which every fourth row is)."""
    sea, farm = sentences(SEA, 60, 1), sentences(FARM, 120, 2)
    rows = [row for number in range(40) for row in (sea[number], *farm[3 * number : 3 * number + 3])]
    return write(tmp_path / "task.jsonl", sea[40:]), write(tmp_path / "pool.jsonl", rows)


def chosen_texts(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def share_of_sea(texts: Sequence[str]) -> float:
    return sum(any(word in SEA for word in text.split()) for text in texts) / len(texts)


@pytest.mark.parametrize("by", ["ngrams", "perplexity"])
def test_planted_rows_are_chosen(files: tuple[Path, Path], tmp_path: Path, by: Any) -> None:
    gold, pool = files
    report = select(Selection(as_pool(pool), as_pool(gold), 40, by=by), tmp_path / "out")
    assert share_of_sea(chosen_texts(tmp_path / "out")) >= 0.95
    assert report.kl_chosen < report.kl_pool


def test_embeddings_of_the_base_find_planted_rows(tmp_path: Path) -> None:
    clinic, stories = (
        [row["text"] for _, row in itertools.islice(open_sources([f"builtin:{name}"])[0].rows(), 120)] for name in ("clinic", "stories")
    )
    gold, pool = write(tmp_path / "task.jsonl", clinic[30:50]), write(tmp_path / "pool.jsonl", [*stories[:90], *clinic[:30]])
    options = {"by": "embeddings", "model": "builtin:tiny", "max_tokens": 64}
    report = select(Selection(as_pool(pool), as_pool(gold), 30, **options), tmp_path / "out")
    assert sum(text in clinic for text in chosen_texts(tmp_path / "out")) >= 20  # 7 or 8 would be chance
    assert sum(report.facts["clusters"]) == 20


def test_random_rows_are_what_the_pool_is(files: tuple[Path, Path], tmp_path: Path) -> None:
    gold, pool = files
    select(Selection(as_pool(pool), as_pool(gold), 80, by="random"), tmp_path / "out")
    assert 0.1 < share_of_sea(chosen_texts(tmp_path / "out")) < 0.4


def test_a_task_set_that_is_the_pool_prefers_nothing() -> None:
    bag = Bag()
    bag.add(sentences(SEA + FARM, 50, 3))
    way = Importance(seed=0)
    way.learn(bag.counts, bag.counts)
    scores, _ = way.score(sentences(SEA + FARM, 50, 3))
    np.testing.assert_allclose(scores, 0, atol=1e-9)


def test_a_word_that_the_task_set_has_not_seen_does_not_condemn_a_row() -> None:
    target, raw = Bag(), Bag()
    target.add(["ship sail harbour"] * 3)
    raw.add([*sentences(FARM, 100, 5), "ship sail harbour zeppelin"])
    way = Importance(seed=0)
    way.learn(target.counts, raw.counts)
    scores, _ = way.score(["ship sail harbour zeppelin", "cow barn wheat goat"])
    assert scores[0] > 0 > scores[1]


def test_ngram_models_agree_where_the_task_set_says_nothing() -> None:
    reader = WordReader()
    models = NgramModels(reader.read(sentences(SEA, 30, 6)), reader.read(sentences(SEA + FARM, 300, 7)))
    gained = models.log_ratios(reader.read(["ship", "tractor", "unheard"]))
    assert gained[0] > 0.3
    assert gained[1] < -0.3
    # no sentence on the farm is in the task set, so that all of it is a little less likely, and a word of neither no more than that
    assert gained[1] == pytest.approx(gained[2], abs=0.01)


def test_rows_are_copied_byte_for_byte(tmp_path: Path) -> None:
    gold = write(tmp_path / "task.jsonl", sentences(SEA, 5, 1))
    lines = [
        b'{ "text" : "the ship is \\u00e9t\\u00e9" , "n": 1.50 }\r\n',
        b"\n",
        b'{"text":"the ship went to the \xe2\x98\x83 harbour","tags":[1,  2]}\n',
        b'{"text": "last ship, no line end"}',
    ]
    (tmp_path / "pool.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + b"".join(lines)))
    report = select(Selection(as_pool(tmp_path / "pool.jsonl.gz"), as_pool(gold), 3), tmp_path / "out")
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == lines[0] + lines[2] + lines[3] + b"\n"
    assert report.is_verbatim
    wheres = [json.loads(line)["where"] for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert wheres == ["pool.jsonl.gz:1", "pool.jsonl.gz:3", "pool.jsonl.gz:4"]


def test_lines_of_text_stay_lines_of_text(tmp_path: Path) -> None:
    gold = write(tmp_path / "task.jsonl", sentences(SEA, 5, 1))
    (tmp_path / "pool.txt").write_bytes(b"the ship  \r\n   \r\n a cow\nthe harbour\n")
    pool = Pool(open_sources([str(tmp_path / "pool.txt")], "line"))
    select(Selection(pool, as_pool(gold), 3), tmp_path / "out")
    assert (tmp_path / "out" / "rows.txt").read_bytes() == b"the ship  \r\n a cow\nthe harbour\n"


def test_rows_of_tables_are_written_as_json_with_their_values(tmp_path: Path) -> None:
    gold = write(tmp_path / "task.jsonl", sentences(SEA, 5, 1))
    (tmp_path / "pool.csv").write_text('id,text\n7,"a ship,\nand a sail"\n8,a cow\n')
    report = select(Selection(as_pool(tmp_path / "pool.csv"), as_pool(gold), 1, by="ngrams"), tmp_path / "out")
    assert [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()] == [
        {"id": "7", "text": "a ship,\nand a sail"}
    ]
    assert not report.is_verbatim
    assert "rows are written as JSON" in (tmp_path / "out" / "report.txt").read_text()


@pytest.mark.parametrize("by", ["ngrams", "perplexity", "random"])
def test_neither_order_nor_chunks_of_the_pool_matter(
    files: tuple[Path, Path], tmp_path: Path, by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gold, pool = files
    lines = pool.read_text().splitlines(keepends=True)
    random.Random(5).shuffle(lines)
    (tmp_path / "shuffled.jsonl").write_text("".join(lines))
    select(Selection(as_pool(pool), as_pool(gold), 30, by=by), tmp_path / "a")
    monkeypatch.setattr(pool_module, "CHUNK_ROWS", 7)
    select(Selection(as_pool(tmp_path / "shuffled.jsonl"), as_pool(gold), 30, by=by), tmp_path / "b")
    assert sorted(chosen_texts(tmp_path / "a")) == sorted(chosen_texts(tmp_path / "b"))


def test_another_seed_draws_other_rows(files: tuple[Path, Path], tmp_path: Path) -> None:
    gold, pool = files
    for seed in (1, 2):
        select(Selection(as_pool(pool), as_pool(gold), 20, by="ngrams", seed=seed), tmp_path / str(seed))
    assert chosen_texts(tmp_path / "1") != chosen_texts(tmp_path / "2")


def test_repeats_task_rows_and_evaluation_rows_are_left_out(tmp_path: Path) -> None:
    sea = sentences(SEA, 12, 1)
    gold, held_out = write(tmp_path / "task.jsonl", sea[:5]), write(tmp_path / "test.jsonl", sea[5:6])
    rows = [sea[6], sea[6].upper(), " " + sea[6], sea[0], f"He said: {sea[5]}!", "  ", *sea[7:]]
    pool = write(tmp_path / "pool.jsonl", rows)
    report = select(Selection(as_pool(pool), as_pool(gold), 100, evaluation=as_pool(held_out)), tmp_path / "out")
    assert chosen_texts(tmp_path / "out") == [sea[6], *sea[7:]]
    assert report.left_out == {
        "copies of chosen rows": 2,
        "near copies of chosen rows": 0,
        "rows of the task set": 1,
        "rows that hold an evaluation row": 1,
        "without text": 1,
    }
    assert "left out: 2 copies of chosen rows, 1 rows of the task set" in (tmp_path / "out" / "report.txt").read_text()


@pytest.mark.parametrize("by", ["perplexity", "ngrams", "random"])
def test_of_near_copies_the_better_one_is_chosen_and_the_place_is_filled(files: tuple[Path, Path], tmp_path: Path, by: Any) -> None:
    gold, pool = files
    rows = [json.loads(line)["text"] for line in pool.read_text().splitlines()]
    copies = [f"{row} {row}; again: {word} {row}" for row in rows for word in ("so", "thus", "then")]
    plenty = write(tmp_path / "plenty.jsonl", copies)
    report = select(Selection(as_pool(plenty), as_pool(gold), 30, by=by), tmp_path / "out")
    origins = [text.split(";")[0] for text in chosen_texts(tmp_path / "out")]
    assert len(set(origins)) == len(origins) == 30
    assert report.left_out["near copies of chosen rows"] > 0
    assert f"{report.left_out['near copies of chosen rows']} near copies of chosen rows" in "\n".join(report.lines())
    select(Selection(as_pool(plenty), as_pool(gold), 30, by=by, min_near=1.0), tmp_path / "all")
    kept = [text.split(";")[0] for text in chosen_texts(tmp_path / "all")]
    assert len(set(kept)) < len(kept) == 30
    if by == "perplexity":  # each of the best is there, once
        best = sorted(report.chosen, key=lambda row: row.score, reverse=True)
        assert [row.rank for row in report.chosen] == [row.rank for row in best]


def test_groups_fill_the_places_of_what_is_left_out() -> None:
    keys, groups = np.array([9.0, 8.0, 7.0, 6.0, 1.0, 0.5]), np.array([0, 0, 0, 0, 1, 1])
    best = Best(4, [3, 1], has_spare=True)
    best.offer(keys, keys, groups, np.arange(1, 7, dtype=np.uint64), np.arange(6), 0)
    assert [row.index for row in best.candidates()] == [0, 1, 2, 3, 4, 5]
    assert [row.index for row in best.chosen()[0]] == [0, 1, 2, 4]
    assert [row.index for row in best.chosen({1, 5})[0]] == [1, 2, 3, 5]


NO_DOUBT = Evidence(
    by="ngrams", reads_words=True, num_asked=10, num_chosen=10, num_unlike=0, pool_scores={"1%": -1.0, "50%": 0.1},
    chosen_scores={"1%": 0.5, "50%": 0.9}, kl_pool=3.0, kl_chosen=2.0, num_task_rows=20, num_task_words=400, num_different=90, num_known=80,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"num_chosen": 8}, "10 rows were asked for and 8 could be chosen"),
        ({"num_task_rows": 1, "num_task_words": 12}, "the task set is 1 row of 12 words"),
        ({"num_known": 9}, "of 90 different words of the task set 9 stand in the pool"),
        ({"num_known": 9, "reads_words": False}, None),
        ({"kl_chosen": 3.2}, "further from the task (3.200 nats) than the pool's (3.000)"),
        ({"kl_chosen": 3.0000001}, "no nearer to the task than the pool's (3.000 nats)"),
        ({"chosen_scores": {"1%": 0.1, "50%": 0.1}}, "scores are flat: 0.1 in the middle of the pool"),
        ({"num_unlike": 4}, "4 of 10 chosen rows score 0 or less"),
        ({"num_unlike": 4, "by": "embeddings"}, None),
        ({"chosen_scores": {"1%": 0.05, "50%": 0.9}}, "the last chosen rows score 0.05, below the middle of the pool (0.1)"),
        ({"by": "random", "kl_chosen": 3.2, "num_known": 0}, None),
    ],
)
def test_a_selection_that_says_nothing_of_the_task_is_doubted(changes: dict[str, Any], said: str | None) -> None:
    found = doubts(replace(NO_DOUBT, **changes))
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_doubts_are_printed_and_written(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gold, pool = files
    foreign = write(tmp_path / "foreign.jsonl", ["zzz yyy xxx"])
    assert main.run(["data", "select", str(pool), "--like", str(foreign), "-n", "20", "-o", str(tmp_path / "void")]) == 0
    printed, kept = capsys.readouterr().out, json.loads((tmp_path / "void" / "report.json").read_text())["warnings"]
    for reason in ("too few to tell", "0 stand in the pool"):
        assert any(reason in warning for warning in kept)
    for warning in kept:
        assert f"warning: {warning}" in printed
        assert f"warning: {warning}" in (tmp_path / "void" / "report.txt").read_text()
    assert main.run(["data", "select", str(pool), "--like", str(gold), "-n", "20", "-o", str(tmp_path / "good"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == []


def test_chunks_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = as_pool(write(tmp_path / "pool.jsonl", ["x" * 30] * 10))
    monkeypatch.setattr(pool_module, "CHUNK_ROWS", 4)
    assert [(chunk.first, len(chunk)) for chunk in pool.chunks()] == [(0, 4), (4, 4), (8, 2)]
    monkeypatch.setattr(pool_module, "CHUNK_CHARS", 50)
    assert [len(chunk) for chunk in pool.chunks()] == [2, 2, 2, 2, 2]


@pytest.mark.parametrize("count", [1, 5, 200])
def test_best_is_what_sorting_would_give(count: int) -> None:
    generator = np.random.default_rng(count)
    digests = generator.integers(0, 60, 200).astype(np.uint64)
    keys = digests.astype(np.float64) % 17
    best = Best(count, [count])
    for start in range(0, 200, 30):
        part = slice(start, start + 30)
        best.offer(keys[part], keys[part], np.zeros(len(keys[part]), dtype=np.int64), digests[part], np.arange(200)[part], 0)
    rows, copies = best.chosen()
    expected = sorted({(float(key), int(digest)) for key, digest in zip(keys, digests, strict=True)}, reverse=True)[:count]
    assert [(row.key, row.digest) for row in rows] == expected
    assert copies == sum(int((digests == row.digest).sum()) - 1 for row in rows)
    assert all(row.index == int(np.flatnonzero(digests == row.digest)[0]) for row in rows)


def test_each_group_chooses_its_quota_first() -> None:
    keys, groups = np.array([9.0, 8.0, 7.0, 6.0, 1.0, 0.5]), np.array([0, 0, 0, 0, 1, 1])
    digests, indices = np.arange(1, 7, dtype=np.uint64), np.arange(6)
    for quotas, expected in (([3, 1], [0, 1, 2, 4]), ([1, 3], [0, 1, 4, 5]), ([2, 0], [0, 1, 2, 3]), ([4], [0, 1, 2, 3])):
        best = Best(4, quotas)
        best.offer(keys, keys, groups, digests, indices, 0)
        # a group that has fewer rows than its quota leaves the rest to the best of all
        assert [row.index for row in best.chosen()[0]] == expected


def test_a_selection_covers_the_task_set() -> None:
    vectors = {"a": [1.0, 0.0, 0.1], "b": [0.0, 1.0, 0.1], "c": [0.3, 0.3, -1.0]}

    def encode(texts: Sequence[str]) -> Any:
        return np.array([vectors[text[0]] for text in texts], dtype=np.float32) + 1e-3 * np.array([[len(text)] * 3 for text in texts])

    class Fixed(Pool):
        def chunks(self) -> Any:
            yield pool_module.Chunk(0, 0, ("",) * 30, tuple(letter + "x" * number for number in range(10) for letter in "abc"))

    way = Neighbours(encode, seed=0, neighbours=1, num_clusters=2)
    way.fit(["a", "ax", "axx", "b"], Fixed(()), lambda done, what: None)
    # half of the rows are shared out, by the clusters' share of the task set
    assert sorted(way.quotas(8)) == [1, 3]
    assert sum(way.quotas(7)) == 3
    assert way.quotas(1) == [0, 0]
    scores, groups = way.score(["axxx", "bxxx", "cxxx"])
    assert groups[0] != groups[1]
    assert scores[2] < min(scores[:2])


def test_whitening_gives_all_directions_about_the_same_variance() -> None:
    generator = np.random.default_rng(0)
    sample = (generator.normal(size=(4000, 3)) @ np.array([[5.0, 1, 0], [0, 2, 1], [0, 0, 4]])).astype(np.float32)
    white = (sample - sample.mean(axis=0)) @ whitening(sample)
    spread = np.linalg.eigvalsh(np.cov(white.T))
    assert 0.6 < spread.min() < spread.max() <= 1.0
    before = np.linalg.eigvalsh(np.cov(sample.T))
    assert before.max() / before.min() > 5


def test_clusters_find_what_lies_together() -> None:
    angles = np.concatenate([np.linspace(0, 0.2, 10), np.linspace(2, 2.2, 20), np.linspace(4, 4.2, 5)])
    found = clusters_of(np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32), 3, seed=1)
    assert sorted(np.bincount(found).tolist()) == [5, 10, 20]
    assert clusters_of(np.ones((4, 2), dtype=np.float32), 3, seed=1).tolist() == [0, 0, 0, 0]


def test_bits_per_byte_are_those_of_the_model_alone() -> None:
    model = TextModel("builtin:tiny", max_tokens=64, device="cpu", has_head=True)
    texts = ["Once there was a fox.", "x", "The fox ran to the river and the river was cold.", ""]
    found = model.bits_per_byte(texts)
    for text, bits in zip(texts[:3], found, strict=False):
        ids = [model.tokenizer.bos_id] if model.tokenizer.adds_bos else []
        ids += model.tokenizer.encode(text)[0]
        with torch.inference_mode():
            logits = model.module(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        nats = -sum(float(logits[place, token]) for place, token in enumerate(ids[1:]))
        num_bytes = len(text.encode()) if model.tokenizer.adds_bos else len(text.encode()) - model.tokenizer.encode(text)[1][0][1]
        expected = nats / np.log(2) / num_bytes if num_bytes else np.inf
        assert bits == pytest.approx(expected, rel=1e-4)
    assert found[3] == np.inf


def test_vectors_are_the_mean_over_the_tokens_that_are_read() -> None:
    model = TextModel("builtin:tiny", max_tokens=8, device="cpu")
    long = "The fox ran to the river, and the river was cold. " * 3
    together = model.vectors(["A fox.", long, ""])
    np.testing.assert_allclose(together[0], model.vectors(["A fox."])[0], atol=1e-5)
    ids = model.tokenizer.encode(long)[0]
    ids = [model.tokenizer.bos_id, *ids][:8] if model.tokenizer.adds_bos else ids[:8]
    with torch.inference_mode():
        states = model.module.base_model(torch.tensor([ids])).last_hidden_state[0]
    np.testing.assert_allclose(together[1], states.mean(dim=0).numpy(), atol=1e-4)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A BERT without a head, with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *PLAIN, *SEA, *FARM]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_an_encoder_folder_serves_as_well(files: tuple[Path, Path], tmp_path: Path, encoder: Path) -> None:
    gold, pool = files
    select(Selection(as_pool(pool), as_pool(gold), 40, by="embeddings", model=str(encoder)), tmp_path / "out")
    assert share_of_sea(chosen_texts(tmp_path / "out")) > 0.5


def test_spread_and_sample_have_a_bound_and_are_fair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftcli.data.select.best.MAX_SPREAD", 2000)
    digests = digests_of(str(number) for number in range(20_000))
    values = np.arange(20_000, dtype=np.float64)
    spread, sample = Spread(), Sample(200)
    for start in range(0, 20_000, 3000):
        part = slice(start, start + 3000)
        spread.add(values[part], digests[part])
        sample.add(uniform(digests[part], 1), digests[part], [str(int(value)) for value in values[part]], 10)
    assert spread.count == 20_000
    assert sum(map(len, spread._values)) <= 2000
    assert spread.quantiles()["50%"] == pytest.approx(10_000, rel=0.1)
    assert len(sample.texts()) == 200
    assert np.mean([float(text) for text in sample.texts()]) == pytest.approx(10_000, rel=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "embeddings"}, "needs one model"),
        ({"by": "perplexity", "model": "builtin:tiny"}, "compares two models"),
        ({"by": "ngrams", "model": "builtin:tiny"}, "uses no model"),
    ],
)
def test_models_that_are_missing_or_useless_are_refused(
    files: tuple[Path, Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    gold, pool = files
    with pytest.raises(UsageError, match=message):
        select(Selection(as_pool(pool), as_pool(gold), 5, **options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_language_models_are_compared(files: tuple[Path, Path], tmp_path: Path) -> None:
    gold, pool = files
    both = {"model": "builtin:tiny", "general_model": "builtin:tiny"}
    report = select(Selection(as_pool(pool), as_pool(gold), 5, by="perplexity", **both), tmp_path / "out")
    assert set(report.pool_scores.values()) == {0.0}


def test_a_pool_of_task_rows_alone_leaves_nothing(files: tuple[Path, Path], tmp_path: Path) -> None:
    gold, _ = files
    with pytest.raises(DataError, match="no row of the pool is left: 20 rows of the task set"):
        select(Selection(as_pool(gold), as_pool(gold), 5), tmp_path / "out")
    assert list(tmp_path.glob("*out*")) == []


def test_a_column_without_text_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    gold, pool = files
    with pytest.raises(DataError, match="did you mean `text`"):
        select(Selection(Pool(open_sources([str(pool)]), "texts"), as_pool(gold), 5), tmp_path / "out")


def test_the_command_writes_a_folder_once(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gold, pool = files
    arguments = ["data", "select", str(pool), "--like", str(gold), "-n", "30", "-o", str(tmp_path / "out")]
    assert main.run([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["chosen_rows"] == 30
    assert report["sources"] == [{"name": "pool", "rows": 160, "chosen": 30}]
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written == {key: value for key, value in report.items() if key != "folder"}
    ranks = sorted(json.loads(line)["rank"] for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines())
    assert ranks == list(range(1, 31))
    assert main.run(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_shares_are_shares_and_a_divergence_is_never_negative() -> None:
    """A pool of a few words leaves most buckets empty; each of these has a share, too."""
    pool, task = Bag(), Bag()
    pool.add(["one small pool of words"])
    task.add(["other words of the task"])
    assert float(shares_of(pool.counts).sum()) == pytest.approx(1.0)
    assert kl(task.counts, pool.counts) > 0
    assert kl(pool.counts, pool.counts) > 0  # smoothed, so that it is not zero either


def test_a_place_that_takes_no_folder_is_refused(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    gold, pool = files
    assert main.run(["data", "select", str(pool), "--like", str(gold), "-n", "5", "-o", "/proc/nothing"]) == 2
    assert "no folder can be made at `/proc/nothing`" in capsys.readouterr().err


def test_a_misspelt_way_gets_a_hint(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gold, pool = files
    assert main.run(["data", "select", str(pool), "--like", str(gold), "-n", "3", "-o", str(tmp_path / "o"), "--by", "ngram"]) == 2
    assert "did you mean `ngrams`?" in capsys.readouterr().err


def test_what_stands_around_a_text_changes_no_bit_of_its_sum() -> None:
    ends = np.array([3, 3, 11, 40], dtype=np.int64)
    values = np.random.default_rng(5).normal(size=40) * 10.0 ** np.arange(-20, 20)
    together = Words(np.zeros(40, dtype=np.uint64), ends).sums(values)
    alone = [
        Words(np.zeros(b - a, dtype=np.uint64), np.array([b - a])).sums(values[a:b])[0] for a, b in itertools.pairwise([0, *ends.tolist()])
    ]
    assert together.tolist() == alone
    assert together[1] == 0
