"""What comes with the package: data sets that do not leak, a tokenizer that misses nothing, a corpus that can be made again."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftcli.builtin import catalogue
from ftcli.errors import DataError, RequestError

ROOT = Path(__file__).resolve().parents[2]
# What makes two rows of a data set the same task: for orders the order in plain English, for the rest its texts.
KEYS = {
    "stories": lambda row: row["text"],
    "clinic": lambda row: row["text"],
    "orders": lambda row: row["messages"][1]["content"],
    "reviews": lambda row: row["text"],
    "preferences": lambda row: (row["prompt"], row["chosen"], row["rejected"]),
}


def rows_of(name: str, split: str) -> list[dict[str, Any]]:
    with gzip.open(catalogue.dataset_path(name, split), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", catalogue.DATASETS)
def test_no_row_is_in_both_splits_or_twice_in_one(name: str) -> None:
    keys = [KEYS[name](row) for split in catalogue.SPLITS for row in rows_of(name, split)]
    assert len(keys) == len(set(keys)) > 1000


def test_data_files_are_the_recorded_bytes_and_packed_without_a_time_stamp() -> None:
    recorded = json.loads((catalogue.dataset_path("stories").parent / "sha256.json").read_text())
    for name in catalogue.DATASETS:
        for split in catalogue.SPLITS:
            packed = catalogue.dataset_path(name, split).read_bytes()
            assert hashlib.sha256(gzip.decompress(packed)).hexdigest() == recorded[f"{name}-{split}"]
            assert packed[4:8] == bytes(4)  # the time field of the gzip header


def test_orders_have_one_right_answer_that_is_compact_json() -> None:
    for row in rows_of("orders", "test"):
        system, order, answer = (message["content"] for message in row["messages"])
        parsed = json.loads(answer)
        assert json.dumps(parsed) == answer
        assert parsed["to"] in order
        assert 1 <= len(parsed["items"]) <= 3
        assert system


@pytest.mark.parametrize(("name", "hint"), [("storys", "did you mean `stories`"), ("zzz", "`orders`")])
def test_a_wrong_data_set_name_gets_a_hint(name: str, hint: str) -> None:
    with pytest.raises(DataError, match=rf"unknown data set `{name}`\n.*{hint}"):
        catalogue.dataset_path(name)


def test_a_wrong_split_and_a_wrong_model_get_a_hint() -> None:
    with pytest.raises(DataError, match=r"unknown split `tset`\n.*did you mean `test`"):
        catalogue.dataset_path("orders", "tset")
    with pytest.raises(RequestError, match=r"unknown model `tinny`\n.*did you mean `tiny`"):
        catalogue.model_folder("tinny")


def test_package_stays_below_twelve_megabytes() -> None:
    folder = catalogue.dataset_path("stories").parent.parent
    assert sum(file.stat().st_size for file in folder.rglob("*") if "__pycache__" not in file.parts) < 12_000_000


def test_tokenizer_encodes_every_byte_and_gives_it_back() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(catalogue.model_folder("tiny") / "tokenizer.json"))
    text = "".join(map(chr, range(0x800))) + "漢字 🦊 \U0010ffff 2026\r\n\t  x"
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(encoding.ids) == text
    every_byte = {token for token in tokenizer.get_vocab() if len(token) == 1}
    assert len(every_byte) == 256


def test_chat_template_is_prefix_preserving_and_ends_every_turn() -> None:
    from ftcli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("builtin:tiny")
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day"},
        {"role": "user", "content": "Bye"},
    ]
    whole = tokenizer.render(messages)
    assert all(whole.startswith(tokenizer.render(messages[:count])) for count in range(1, len(messages)))
    assert tokenizer.render(messages[:2], add_generation_prompt=True) + "Good day<|im_end|>\n" == tokenizer.render(messages[:3])
    assert whole.count("<|im_end|>") == len(messages)


GRAMMAR = """
import hashlib, sys
sys.path.insert(0, "scripts")
from base import facts, stories, talk
from base.dice import Dice
texts = [draw(Dice(1, "x", n)) for n in range(40) for draw in (stories.story, talk.letter, talk.notice, facts.fact_page)]
print(hashlib.sha256("".join(texts).encode()).hexdigest())
"""


def test_grammar_says_the_same_whatever_the_hash_seed() -> None:
    said = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        said.append(subprocess.run([sys.executable, "-c", GRAMMAR], cwd=ROOT, env=environment, capture_output=True, check=True).stdout)
    assert said[0] == said[1]


@pytest.mark.slow
def test_rebuilding_gives_the_recorded_hashes() -> None:
    done = subprocess.run([sys.executable, "scripts/build_base.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


LEAKS = """
import json, sys
sys.path.insert(0, "scripts")
from base import corpus
texts, chats, sets = corpus.build()
corpus_text = "\\n".join([row["text"] for row in texts] + [message["content"] for row in chats for message in row["messages"]])
held_out = [row["text"] for name in ("stories", "clinic", "reviews") for row in sets[f"{name}-test"]]
held_out += [row["messages"][1]["content"] for split in ("train", "test") for row in sets[f"orders-{split}"]]
held_out += [row["messages"][2]["content"] for row in sets["orders-test"]] + [row["text"] for row in sets["clinic-train"]]
print(sum(text in corpus_text for text in held_out), len(held_out))
"""


@pytest.mark.slow
def test_nothing_held_out_and_no_order_of_the_task_is_in_the_corpus() -> None:
    done = subprocess.run([sys.executable, "-c", LEAKS], cwd=ROOT, capture_output=True, text=True, check=True)
    found, looked_for = map(int, done.stdout.split())
    assert found == 0
    assert looked_for > 5000
