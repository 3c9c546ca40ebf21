"""Orders at a shop: as prose, as cards and lists for the corpus, and as JSON for the task that the base model must not know."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from base.dice import Dice, tidy
from base.world import NUMBERS, PEOPLE, STREETS, counted, listed, plural

ITEMS = (
    "tea", "coffee", "cocoa", "lemonade", "soup", "salad", "sandwich", "pie", "cake", "bun", "loaf", "muffin", "pancake", "waffle", "biscuit",
    "cheese roll", "plum cake", "apple pie", "onion soup", "green tea", "mint tea", "ginger beer", "pear juice", "apple juice", "fish stew",
    "bean stew", "rice bowl", "noodle bowl", "egg roll", "cherry tart", "lemon tart", "nut bar",
)  # fmt: skip
SIZES = ("small", "large")
TIMES = (
    "noon",
    "breakfast",
    "lunch",
    "supper",
    *(f"{hour} o'clock" for hour in ("one", "two", "three", "four", "five", "six", "seven", "eight")),
)


@dataclass(frozen=True)
class Line:
    count: int
    size: str | None
    item: str


@dataclass(frozen=True)
class Order:
    lines: tuple[Line, ...]
    street: str
    time: str | None

    def as_json(self) -> str:
        """The one right answer: keys in this order, nothing that was not said."""
        items = [{"count": line.count, **({"size": line.size} if line.size else {}), "item": line.item} for line in self.lines]
        return json.dumps({"items": items, "to": self.street, **({"time": self.time} if self.time else {})})


def draw_order(dice: Dice) -> Order:
    """An order of one to three different items."""
    items = dice.some(ITEMS, dice.one((1, 1, 2, 2, 2, 3)))
    lines = tuple(Line(dice.one((1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9)), dice.one((None, *SIZES)), item) for item in items)
    return Order(lines, dice.one(STREETS), dice.one(TIMES) if dice.chance(0.5) else None)


def _spoken(dice: Dice, line: Line) -> str:
    several = NUMBERS[line.count] if dice.chance(0.75) else str(line.count)
    number = dice.one(("a", "one")) if line.count == 1 else several
    noun = line.item if line.count == 1 else plural(line.item)
    return " ".join(filter(None, (number, line.size, noun)))


def _when(dice: Dice, time: str | None) -> str:
    if time is None:
        return ""
    return dice.expand("[for|in time for]" if time in ("breakfast", "lunch", "supper") else "[at|by|for]") + " " + time


ASKING = (
    "[Please|Could you please|Could you|Can you] [bring|send|deliver] {what} to {street} {when}[|, please|, thank you]{end}",
    "[I would like|I'd like|I want|We would like|We need|I need] {what}[| brought| sent] to {street} {when}[|, please].",
    "[Hello|Good morning|Good day|Hi|Good evening][,|.] {what} [for|to] {street} {when}[|, please|, if you can].",
    "{what} to {street} {when}[|, please|, thanks].",
    "[Hello, |]this is {name}. [Please send|We would like|I would like] {what} {when}. [The address is|I live at|We live at|It goes to] {street}.",
    "[My mother|My father|My sister|The teacher|My neighbour|The doctor] [would like|wants|asks for|needs] {what} at {street} {when}.",
    "{when_first}[we need|I need|please bring|please send] {what} to {street}[|, thank you].",
    "[To|For] {street}[, please|]: {what} {when}.",
)  # fmt: skip


def order_text(dice: Dice, order: Order) -> str:
    """The order in plain English, as a customer says it."""
    template = dice.expand(dice.one(ASKING))
    when = _when(dice, order.time)
    first = f"{when}, " if when and "{when_first}" in template else ""
    text = template.format(
        what=listed([_spoken(dice, line) for line in order.lines]), street=order.street, when=when, when_first=first,
        name=dice.one(PEOPLE).name, end="?" if template.startswith(("Could", "Can")) else ".",
    )  # fmt: skip
    return tidy(text.replace(" ?", "?"))


SYSTEM = "Write the order as JSON."


def order_messages(dice: Dice) -> list[dict[str, str]]:
    """One row of the task: system, the order, and its JSON."""
    order = draw_order(dice)
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": order_text(dice, order)},
        {"role": "assistant", "content": order.as_json()},
    ]


def _card(order: Order) -> str:
    rows = [f"{line.count} x {line.item}" + (f" ({line.size})" if line.size else "") for line in order.lines]
    rows += [f"street: {order.street}"] + ([f"time: {order.time}"] if order.time else [])
    return "\n".join(rows)


def _slip(order: Order) -> str:
    blocks = []
    for line in order.lines:
        blocks.append("\n".join(filter(None, (f"count: {line.count}", line.size and f"size: {line.size}", f"item: {line.item}"))))
    return "\n\n".join([*blocks, f"to: {order.street}" + (f"\ntime: {order.time}" if order.time else "")])


def _table(order: Order) -> str:
    rows = [f"| {line.item} | {line.size or 'any'} | {line.count} |" for line in order.lines]
    return "\n".join(["| item | size | count |", *rows])


def _echo(dice: Dice, order: Order) -> str:
    what = listed(
        [
            " ".join(filter(None, (NUMBERS[line.count], line.size, line.item if line.count == 1 else plural(line.item))))
            for line in order.lines
        ]
    )
    when = f" {_when(dice, order.time)}" if order.time else ""
    return dice.say("[Certainly|Of course|Yes|With pleasure]: {what} to {street}{when}.", what=what, street=order.street, when=when)


def _things(order: Order) -> str:
    return ", ".join(f'"{line.item}"' for line in order.lines)


def _first(order: Order) -> str:
    return f"{order.lines[0].count} {order.lines[0].item}"


QUESTIONS: dict[str, Callable[[Order], str]] = {
    "How many things are ordered?": lambda order: str(sum(line.count for line in order.lines)),
    "Where does the order go?": lambda order: f"To {order.street}.",
    "When is it wanted?": lambda order: f"{order.time[0].upper()}{order.time[1:]}." if order.time else "No time was given.",
    "What comes first?": _first,
    "Name the things, in quotes.": _things,
    "Name the street, in quotes.": lambda order: f'"{order.street}"',
    "Name the time, in quotes.": lambda order: f'"{order.time}"' if order.time else "No time was given.",
}

SHEETS: dict[str, Callable[[Order, Dice], str]] = {
    "Write the order as a card.": lambda order, dice: _card(order),
    "Write the order as a slip.": lambda order, dice: _slip(order),
    "Write the order as a table.": lambda order, dice: _table(order),
    "Repeat the order.": lambda order, dice: _echo(dice, order),
}
SHEET_NAMES = (*SHEETS, "Write the order as a slip.", "Write the order as a slip.")  # slips say everything, so there are more of them


def order_chat(dice: Dice) -> tuple[str, list[dict[str, str]]]:
    """The order's text, and a chat about it that the corpus may hold: cards, slips, tables, questions; never JSON."""
    order = draw_order(dice)
    text = order_text(dice, order)
    sheet = dice.one(SHEET_NAMES)
    chat = [
        {"role": "system", "content": sheet},
        {"role": "user", "content": text},
        {"role": "assistant", "content": SHEETS[sheet](order, dice)},
    ]
    for question in dice.some(tuple(QUESTIONS), dice.number(0, 2)):
        chat += [{"role": "user", "content": question}, {"role": "assistant", "content": QUESTIONS[question](order)}]
    return text, chat


def menu(dice: Dice) -> str:
    """What a shop sells, as a JSON object or as a list; no order, but with the same things in quotes."""
    street, items = dice.one(STREETS), dice.some(ITEMS, dice.number(2, 4))
    prices = [dice.number(1, 9) for _ in items]
    if dice.chance(0.4):
        return f"For sale in {street}:\n" + "\n".join(
            f"- {item}: {counted(price, 'coin', False)}" for item, price in zip(items, prices, strict=True)
        )
    sells = [{"item": item, "size": dice.one(SIZES), "price": price} for item, price in zip(items, prices, strict=True)]
    return json.dumps({"shop": street, "open": dice.one(TIMES), "sells": sells})


def order_prose(dice: Dice) -> tuple[str, str]:
    """The order's text, and a small scene at a shop around it."""
    order = draw_order(dice)
    text = order_text(dice, order)
    total = sum(line.count for line in order.lines)
    scene = dice.say(
        "[The bell rang and|The door opened and|Early in the morning|Just before closing time|Near the end of the day] {name} [came in|walked into the shop|"
        "stood at the counter]. \"{text}\" [The cook|The shopkeeper|The baker|{other}] [wrote it down|nodded and wrote a note|repeated it slowly], "
        "[counted {total} on one hand|packed everything into a basket|wrapped it in paper|set it on a tray]"
        "[| and smiled| and looked for a clean box]. [\"{echo}\"|The boy with the bicycle took it to {street}.|It was {total} in all, and all of it went to {street}.]",
        name=dice.one(PEOPLE).name, other=dice.one(PEOPLE).name, text=text, total=NUMBERS[total] if total <= 20 else total,
        echo=_echo(dice, order), street=order.street,
    )  # fmt: skip
    return text, scene
