"""Generated answers to held-out prompts, compared with their references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ftcli.data.settings import Generate
    from ftcli.data.store import TreeStore
    from ftcli.models.generate import Progress
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
    model: nn.Module, tokenizer: Tokenizer, questions: Sequence[Question], settings: Generate, progress: Progress | None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Generate greedily and score.

    Returns:
        The mean of each metric in 0..1 with `examples` (how many were answered) and `stopped_ratio` (share of answers the model
        ended itself), and the first few samples.
    """
    from ftcli.models.generate import generate

    if not questions:
        return {"examples": 0}, []
    answers = generate(
        model, tokenizer, [question.prompt for question in questions], max_new_tokens=settings.max_new_tokens, progress=progress
    )
    pairs = list(zip(questions, answers, strict=True))
    scores: dict[str, float] = {
        metric.kind: sum(metric.score(answer.text, question.reference) for question, answer in pairs) / len(pairs)
        for metric in settings.metrics
    }
    samples = [
        {"where": question.where, "prompt": question.prompt, "reference": question.reference, "answer": answer.text}
        for question, answer in pairs[:NUM_SAMPLES]
    ]
    return {**scores, "examples": len(answers), "stopped_ratio": sum(answer.stopped for answer in answers) / len(answers)}, samples
