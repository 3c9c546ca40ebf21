"""Sums in digits and in words, and small problems with a state that changes."""

from __future__ import annotations

from base.dice import Dice
from base.world import NUMBERS, PEOPLE, counted, plural


def sum_line(dice: Dice) -> str:
    """A true equation, in digits or in words."""
    kind = dice.number(1, 5)
    low, high = dice.number(1, 20), dice.number(1, 20)
    if kind == 1:
        return f"{low} + {high} = {low + high}"
    if kind == 2:
        return f"{low + high} - {low} = {high}"
    if kind == 3:
        low, high = dice.number(1, 10), dice.number(1, 10)
        return f"{low} x {high} = {low * high}"
    if kind == 4:
        low, high = dice.number(0, 10), dice.number(0, 10)
        return dice.say("{a} and {b} [make|make|is] {c}.", a=NUMBERS[low], b=NUMBERS[high], c=NUMBERS[low + high])
    low, high = sorted((low, high))
    return dice.say("{a} is less than {b}." if low < high else "{a} is as much as {b}.", a=low, b=high)


def sums_page(dice: Dice) -> str:
    return "\n".join(sum_line(dice) for _ in range(dice.number(3, 8)))


def problem(dice: Dice) -> tuple[str, str]:
    """A word problem of two or three changes, and its worked answer."""
    who, other = (person.name for person in dice.some(PEOPLE, 2))
    noun = dice.one(("apple", "coin", "egg", "candle", "book", "button", "pear", "nail", "shell", "stamp"))
    have = dice.number(3, 12)
    story, steps = [dice.say("{who} has {have}.", who=who, have=counted(have, noun))], []
    for _ in range(dice.number(1, 3)):
        change = dice.number(1, 8)
        if dice.chance(0.5) or change > have:
            story.append(
                dice.say(
                    "[{other} gives {who} {n} more|{who} finds {n} more|{who} buys {n} more].", who=who, other=other, n=NUMBERS[change]
                )
            )
            steps.append(f"{have} + {change} = {have + change}")
            have += change
        else:
            story.append(dice.say("[{who} gives {n} to {other}|{who} loses {n}|{who} sells {n}].", who=who, other=other, n=NUMBERS[change]))
            steps.append(f"{have} - {change} = {have - change}")
            have -= change
    story.append(f"How many {plural(noun)} does {who} have now?")
    return " ".join(story), f"{', '.join(steps)}. {who} has {have} {noun if have == 1 else plural(noun)}."


def sum_question(dice: Dice) -> tuple[str, str]:
    line = sum_line(dice)
    while "=" not in line:
        line = sum_line(dice)
    left, right = line.split(" = ")
    return dice.one((f"What is {left}?", f"How much is {left}?", f"{left} = ?")), dice.one((right, f"{left} = {right}"))
