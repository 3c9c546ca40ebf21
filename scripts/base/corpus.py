"""The corpus and the embedded data sets, drawn so that nothing that is tested was ever trained on."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from base import arithmetic, clinic, facts, orders, preferences, reviews, stories, talk
from base.dice import Dice

Row = dict[str, object]
SEED = 17

# documents of each domain in the corpus; stories are two thirds of its bytes
NUM_TEXTS: dict[Callable[[Dice], str], int] = {
    facts.fact_page: 2200, arithmetic.sums_page: 1500, talk.dialogue: 2500, talk.letter: 1500, talk.notice: 2500, talk.howto: 400, talk.report: 1500, orders.menu: 1500,
}  # fmt: skip
NUM_STORIES, NUM_STORY_CHATS = 9000, 500
NUM_SCENES, NUM_ORDER_CHATS = 2000, 12_000
NUM_REVIEWS, NUM_CHATS, NUM_COPIES = 2500, 4500, 5000
SIZES = {"stories": (3000, 400), "clinic": (2000, 300), "orders": (2000, 300), "reviews": (1500, 300), "preferences": (1500, 200)}


def distinct(draw: Callable[[Dice], str], dice: Dice, count: int) -> list[str]:
    """At most `count` different texts; a small grammar may run out of them."""
    texts: dict[str, None] = {}
    for _ in range(4 * count):
        texts.setdefault(draw(dice))
        if len(texts) == count:
            break
    return list(texts)


def build() -> tuple[list[Row], list[Row], dict[str, list[Row]]]:
    """The corpus' texts, its chats, and the rows of every data set under `<name>-<split>`."""
    num_train, num_test = SIZES["stories"]
    told = distinct(stories.story, Dice(SEED, "stories"), num_test + NUM_STORIES + NUM_STORY_CHATS)
    held_out, told, for_chats = told[:num_test], told[num_test : num_test + NUM_STORIES], told[num_test + NUM_STORIES :]
    taken: set[str] = set()
    texts = [*told]
    for draw, count in NUM_TEXTS.items():
        texts += distinct(draw, Dice(SEED, draw.__name__), count)
    texts += _scenes(taken)
    corpus_reviews = _reviews("corpus", NUM_REVIEWS, set())
    texts += [str(row["text"]) for row in corpus_reviews]
    chats = [*_order_chats(taken), *_question_chats(), *_copy_chats(), *_story_chats(for_chats)]
    chats = list({json.dumps(chat): chat for chat in chats}.values())
    sets = {"stories-train": [{"text": text} for text in told[:num_train]], "stories-test": [{"text": text} for text in held_out]}
    sets |= _halves("orders", _order_rows(taken))
    sets |= _halves("reviews", _reviews("set", sum(SIZES["reviews"]), {str(row["text"]) for row in corpus_reviews}))
    sets |= _halves("clinic", [{"text": text} for text in distinct(clinic.note, Dice(SEED, "clinic"), sum(SIZES["clinic"]))])
    sets |= _halves("preferences", _preference_rows())
    dice = Dice(SEED, "shuffle")
    return dice.some([{"text": text} for text in texts], len(texts)), dice.some([{"messages": chat} for chat in chats], len(chats)), sets


def _halves(name: str, rows: list[Row]) -> dict[str, list[Row]]:
    num_train, num_test = SIZES[name]
    if len(rows) < num_train + num_test:
        raise ValueError(f"{name}: the grammar gave only {len(rows)} different rows")
    return {f"{name}-train": rows[:num_train], f"{name}-test": rows[num_train : num_train + num_test]}


def _scenes(taken: set[str]) -> Iterator[str]:
    dice = Dice(SEED, "scenes")
    for _ in range(NUM_SCENES):
        order, scene = orders.order_prose(dice)
        taken.add(order)
        yield scene


def _order_chats(taken: set[str]) -> Iterator[list[dict[str, str]]]:
    dice = Dice(SEED, "order chats")
    for _ in range(NUM_ORDER_CHATS):
        order, chat = orders.order_chat(dice)
        taken.add(order)
        yield chat


def _order_rows(taken: set[str]) -> list[Row]:
    dice, rows = Dice(SEED, "orders"), list[Row]()
    while len(rows) < sum(SIZES["orders"]):
        messages = orders.order_messages(dice)
        if messages[1]["content"] not in taken:
            taken.add(messages[1]["content"])
            rows.append({"messages": messages})
    return rows


def _question_chats() -> Iterator[list[dict[str, str]]]:
    dice = Dice(SEED, "questions")
    askers = (
        facts.fact_question,
        facts.fact_question,
        facts.reading_question,
        arithmetic.problem,
        arithmetic.sum_question,
        talk.howto_question,
    )
    for _ in range(NUM_CHATS):
        if dice.chance(0.3):
            yield talk.chat(dice)
            continue
        pairs = [dice.one(askers)(dice) for _ in range(dice.number(1, 3))]
        yield [message for ask, answer in pairs for message in ({"role": "user", "content": ask}, {"role": "assistant", "content": answer})]


def _copy_chats() -> Iterator[list[dict[str, str]]]:
    dice = Dice(SEED, "copies")
    for _ in range(NUM_COPIES):
        yield talk.copy_chat(dice)


def _story_chats(told: list[str]) -> Iterator[list[dict[str, str]]]:
    dice = Dice(SEED, "story chats")
    for text in told:
        ask = dice.say("[Tell me|Please tell me|Write|I would like to hear] [a story|a short story].")
        yield [{"role": "user", "content": ask}, {"role": "assistant", "content": text}]


def _reviews(stream: str, count: int, taken: set[str]) -> list[Row]:
    dice, rows = Dice(SEED, "reviews", stream), list[Row]()
    seen = set(taken)
    while len(rows) < count:
        row = reviews.review_row(dice)
        if row["text"] not in seen:
            seen.add(row["text"])
            rows.append({**row})
    return rows


def _preference_rows() -> list[Row]:
    dice, rows, seen = Dice(SEED, "preferences"), list[Row](), set[str]()
    while len(rows) < sum(SIZES["preferences"]):
        row = preferences.preference_row(dice)
        key = f"{row['prompt']}\n{row['chosen']}\n{row['rejected']}"
        if key not in seen:
            seen.add(key)
            rows.append({**row})
    return rows


def as_bytes(rows: Iterable[Row]) -> bytes:
    """JSON Lines in UTF-8, one row a line, newline at the end."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(corpus_folder: Path, data_folder: Path) -> dict[str, str]:
    """Write corpus and data sets; the sha256 of each file's plain bytes under its name.

    The hash is of the plain bytes, because another zlib may pack the same bytes differently.
    """
    texts, chats, sets = build()
    hashes = {}
    for folder, name, rows in (
        (corpus_folder, "corpus-texts", texts),
        (corpus_folder, "corpus-chats", chats),
        *((data_folder, name, rows) for name, rows in sorted(sets.items())),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        plain = as_bytes(rows)
        hashes[name] = hashlib.sha256(plain).hexdigest()
        if folder == corpus_folder:
            (folder / f"{name}.jsonl").write_bytes(plain)
        else:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(plain, compresslevel=9, mtime=0))
    return hashes
