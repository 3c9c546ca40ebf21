"""Generated answers to held-out prompts, compared with their references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcli.models.vote import is_unanimous

if TYPE_CHECKING:
    from torch import nn

    from ftcli.data.settings import Generate
    from ftcli.data.store import TreeStore
    from ftcli.models.generate import Answer, Progress
    from ftcli.models.tokenizer import Tokenizer

NUM_SAMPLES = 5


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt to generate from, and the answer that a row holds."""

    where: str
    prompt: str
    reference: str


def read_questions(model: nn.Module, store: TreeStore, tokenizer: Tokenizer, limit: int | None) -> list[Question]:
    """The questions of the first rows that `store` has trees of, without those that leave no room for an answer in the context."""
    from ftcli.data.example import question_of
    from ftcli.data.prepare import examples_of
    from ftcli.models.generate import context_length, prompt_ids

    context = context_length(model)
    questions = []
    for where, example in examples_of(store, tokenizer, limit):
        prompt, reference = question_of(example, tokenizer.end_texts)
        has_room = bool(prompt) and (context is None or len(prompt_ids(tokenizer, prompt)) < context)
        if reference and has_room:
            questions.append(Question(where, prompt, reference))
    return questions


def score_answers(
    model: nn.Module,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    settings: Generate,
    progress: Progress | None,
    keep_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Generate greedily and score.

    Args:
        keep_row: is given the place and the scores of every single answer.

    Returns:
        Each metric over all answers in 0..1 with `examples` (how many were answered) and `stopped_ratio` (share of answers the model
        ended itself), and the first few samples. The answers of an ensemble are those its members vote for; `ensemble_scores`
        says how they compare, and the samples show them all.
    """
    from ftcli.models.generate import elected, member_answers

    if not questions:
        return {"examples": 0}, []
    prompts = [question.prompt for question in questions]
    groups = member_answers(model, tokenizer, prompts, max_new_tokens=settings.max_new_tokens, progress=progress)
    answers = [elected(group) for group in groups]
    scores: dict[str, Any] = _mean_scores(settings, questions, answers)
    if len(groups[0]) > 1:
        scores |= ensemble_scores(scores, [_mean_scores(settings, questions, column) for column in zip(*groups, strict=True)])
        scores["unanimous_ratio"] = sum(is_unanimous([answer.text for answer in group]) for group in groups) / len(groups)
    samples = [
        {"where": question.where, "prompt": question.prompt, "reference": question.reference, "answer": answer.text}
        | ({"members": [member.text for member in group]} if len(group) > 1 else {})
        for question, answer, group in list(zip(questions, answers, groups, strict=True))[:NUM_SAMPLES]
    ]
    for question, answer in zip(questions, answers, strict=True):
        keep_row({"where": question.where, "scores": _mean_scores(settings, [question], [answer])})
    return {**scores, "examples": len(answers), "stopped_ratio": sum(answer.stopped for answer in answers) / len(answers)}, samples


def _mean_scores(settings: Generate, questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, float]:
    """Each metric over all questions."""
    texts, references = [answer.text for answer in answers], [[question.reference] for question in questions]
    return {metric.key: metric.over(texts, references) for metric in settings.metrics}


def ensemble_scores(voted: Mapping[str, float], members: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """For each metric the best member's score and what the vote gains over it (below 0: it loses), and every member's scores.

    Example:
        >>> ensemble_scores({"exact-match": 0.75}, [{"exact-match": 0.5}, {"exact-match": 0.625}])["gain_exact-match"]
        0.125
    """
    found: dict[str, Any] = {"members": {f"member-{index}": dict(scores) for index, scores in enumerate(members)}}
    for metric, score in voted.items():
        best = max(scores[metric] for scores in members)
        found |= {f"best_member_{metric}": best, f"gain_{metric}": score - best}
    return found
