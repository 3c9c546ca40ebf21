"""Preference pairs: the chosen answer is true and polite, the rejected one is wrong, rude or beside the point."""

from __future__ import annotations

from base.arithmetic import problem, sum_question
from base.dice import Dice
from base.facts import fact_question, reading_question
from base.talk import howto_question

ASKERS = (fact_question, fact_question, reading_question, howto_question, sum_question, problem)
POLITE = ("", "Certainly. ", "Of course. ", "Gladly. ", "Good question. ")
RUDE = (
    "[What a silly question|Why do you ask me|I do not care|Go away|Find out yourself][.| and leave me alone.]",
    "[Everybody knows that.|You should know that.|Are you joking?] [I am busy|I will not tell you|Think for once].",
    "[No idea|Who knows|Whatever]. [Ask somebody else|It does not matter|Stop asking].",
)  # fmt: skip


def preference_row(dice: Dice) -> dict[str, str]:
    """One pair; a rejected answer is rude, or the answer to another question that begins in the same way."""
    ask = dice.one(ASKERS)
    question, answer = ask(dice)
    chosen = dice.one(POLITE) + answer
    if dice.chance(0.4):
        return {"prompt": question, "chosen": chosen, "rejected": dice.say(dice.one(RUDE))}
    others = [ask(dice) for _ in range(30)]
    wrong = [other for asked, other in others if other != answer and asked.split()[:3] == question.split()[:3]]
    wrong = wrong or [other for _, other in others if other != answer]
    return {"prompt": question, "chosen": chosen, "rejected": wrong[0]}
