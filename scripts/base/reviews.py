"""Reviews of things, places and shows in the small world; the opinion decides the words, and the label says which it was."""

from __future__ import annotations

from base.dice import Dice
from base.world import TOWNS

LABELS = ("bad", "mixed", "good")
SUBJECTS = {
    "the inn": (("bed", "soup", "breakfast", "landlord", "room", "fire"), "stayed at", "night"), "the bakery": (("bread", "pie", "cake", "baker", "smell", "queue"), "went to", "visit"),
    "the play": (("acting", "music", "ending", "story", "hall", "costume"), "saw", "evening"), "the ferry": (("crew", "deck", "ticket", "view", "cabin", "crossing"), "took", "trip"),
    "the umbrella": (("handle", "cloth", "colour", "spring", "price", "size"), "bought", "week"), "the lamp": (("light", "glass", "shade", "switch", "price", "stand"), "bought", "month"),
    "the book": (("story", "ending", "hero", "print", "cover", "language"), "read", "evening"), "the boots": (("leather", "sole", "lace", "colour", "price", "heel"), "bought", "walk"),
    "the concert": (("singer", "sound", "hall", "drummer", "programme", "seat"), "heard", "evening"), "the market": (("cheese", "fruit", "price", "crowd", "stall", "fish"), "went to", "morning"),
}  # fmt: skip
PRAISE = (
    "the {part} was [wonderful|lovely|first class|better than I had hoped|a pleasure|just right]", "I [loved|enjoyed|cannot praise enough] the {part}",
    "[everyone|my sister|even my father] [liked|praised] the {part}", "the {part} [made my day|was worth every coin|could not be better]",
    "I have never had a [better|finer] {part}", "nothing was [too much trouble|wrong with the {part}]",
)  # fmt: skip
BLAME = (
    "the {part} was [terrible|a disgrace|worse than I had feared|a disappointment|no good at all]", "I [hated|was sorry about|am still angry about] the {part}",
    "[everyone|my sister|even my patient father] [complained about|laughed at] the {part}", "the {part} [spoiled everything|was a waste of money|could not be worse]",
    "I have never had a [worse|poorer] {part}", "nobody [cared|looked after the {part}]",
)  # fmt: skip
FRAMES = (
    "We {verb} {subject} in {town} [last week|on {day}|for the first time]. {one}[, and|;] {two}. {verdict}",
    "[About|A word about] {subject} in {town}: {one}. {two}. {verdict}",
    "{one}. {two}. That is {subject} in {town} after {count} {unit}. {verdict}",
    "[My cousin told me about {subject}|I had heard much about {subject}], so we {verb} it[| in {town}]. {one}. {two}. {verdict}",
    "{verdict} We {verb} {subject} [on a {day}|in the rain|with the children], and {one}. {two}.",
)  # fmt: skip
VERDICTS = {
    "good": "[We shall come back|I recommend it to all|Go, and take your friends|Well worth the money|I am very happy with it].",
    "bad": "[Never again|Keep away|I want my money back|Save your coins|We left early and angry].",
    "mixed": "[I do not know what to think|It has two sides|Perhaps it will get better|Not bad, not good|We may try again, or not].",
}


def review(dice: Dice, label: str) -> str:
    """A review whose sentences all agree with `label`; a mixed one praises one thing and blames another."""
    subject = dice.one(tuple(SUBJECTS))
    parts, verb, unit = SUBJECTS[subject]
    one, two = dice.some(parts, 2)
    sides = {"good": (PRAISE, PRAISE), "bad": (BLAME, BLAME), "mixed": dice.one(((PRAISE, BLAME), (BLAME, PRAISE)))}[label]
    first = dice.expand(dice.one(sides[0])).replace("{part}", one)
    second = dice.expand(dice.one(sides[1])).replace("{part}", two)
    if label == "mixed":
        second = dice.one(("but ", "on the other hand ", "yet ")) + second
    return dice.say(
        dice.one(FRAMES), verb=verb, subject=subject, town=dice.one(TOWNS), one=first, two=second, verdict=dice.expand(VERDICTS[label]),
        day=dice.one(("Monday", "Friday", "Saturday", "Sunday")), count=dice.one(("one", "a second", "a third")) if unit in ("night", "visit") else "one", unit=unit,
    )  # fmt: skip


def review_row(dice: Dice) -> dict[str, str]:
    label = dice.one(LABELS)
    text = review(dice, label)
    return {"text": text, "label": label, "prompt": f"Review: {text}\nOpinion:", "completion": f" {label}"}
