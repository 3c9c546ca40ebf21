"""Generation: answers written by the model, compared with references."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ftcli.data.formats import Format
from ftcli.evaluation.tasks.shots import Shots, before_each
from ftcli.evaluation.tasks.task import Subject, TaskResult, TaskSettings, mean_figure, share_figure
from ftcli.metrics import Metric

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer


class Generation(TaskSettings):
    """The model answers the prompt of each row; greedy unless a temperature is given."""

    kind: Literal["generation"]
    format: Format | None = None
    """How a row becomes prompt and reference; left out, it is detected from the columns."""
    metrics: tuple[Metric, ...] = Field(min_length=1)
    """How an answer is compared with its reference; the first is what models are compared by."""
    max_new_tokens: int = Field(default=128, ge=1)
    """An answer is cut here."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token each time; above, answers are drawn by `seed`."""
    seed: int = Field(default=17, ge=0)
    """Of drawn answers."""
    stop: tuple[str, ...] = ()
    """Texts at which an answer is cut, for base models that go on after it."""
    shots: Shots | None = None
    """Solved examples before every prompt, as text."""

    main_figure: ClassVar[str] = ""

    def measure(self, subject: Subject) -> TaskResult:
        """The mean of every metric, and the share of answers that the model ended by itself."""
        import numpy as np

        from ftcli.models.generate import context_length, generate, prompt_ids

        found = self._questions(list(self.read_rows()), subject.tokenizer)
        solved = [prompt + reference for _, prompt, reference in found]
        shots = before_each(self.shots, [prompt for _, prompt, _ in found], solved, lambda rows: self._solved(rows, subject.tokenizer))
        prompts = [before + prompt for before, (_, prompt, _) in zip(shots, found, strict=True)]
        context = context_length(subject.model.module)
        fits = [context is None or len(prompt_ids(subject.tokenizer, prompt)) < context for prompt in prompts]
        asked = [prompt for prompt, has_room in zip(prompts, fits, strict=True) if has_room]
        answers = iter(
            generate(
                subject.model.module,
                subject.tokenizer,
                asked,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seed=self.seed,
                progress=_Told(subject),
            )
        )
        rows: list[dict[str, Any]] = []
        num_tokens = 0
        for (where, _, reference), prompt, has_room in zip(found, prompts, fits, strict=True):
            answer = next(answers) if has_room else None
            text = "" if answer is None else _cut(answer.text, self.stop)
            num_tokens += 0 if answer is None else len(answer.tokens)
            scores = {_figure_name(metric.kind): 0.0 if answer is None else metric.score(text, reference) for metric in self.metrics}
            ended = answer is not None and (answer.stopped or text != answer.text)
            rows.append({"where": where, "prompt": prompt, "reference": reference, "answer": text, "ended": float(ended), **scores})
        values = {name: np.array([row[name] for row in rows]) for name in (*(_figure_name(m.kind) for m in self.metrics), "ended")}
        figures = {name: share_figure(found) if name == "ended" else mean_figure(found) for name, found in values.items()}
        left = len(prompts) - len(asked)
        notes = [f"{left} prompts leave no room for an answer: they count as wrong"] if left else []
        return TaskResult(figures, rows, notes, num_tokens)

    def _questions(self, rows: list[tuple[str, dict[str, Any]]], tokenizer: Tokenizer) -> list[tuple[str, str, str]]:
        """(where, prompt, reference) of every row.

        Raises:
            DataError: a row has nothing to be asked, or no answer.
        """
        from ftcli.data.example import question_of
        from ftcli.data.formats.detect import detect_format
        from ftcli.errors import DataError, Problem

        settings = self.format or detect_format([row for _, row in rows[:64]], f"task `{self.name}`")
        found = []
        for where, row in rows:
            prompt, reference = question_of(settings.example(row, tokenizer, where), tokenizer.end_texts)
            if not prompt or not reference:
                raise DataError(
                    f"task `{self.name}`", [Problem(where, "the row has no prompt with an answer", "a text alone is no question")]
                )
            found.append((where, prompt, reference))
        return found

    def _solved(self, rows: Any, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
        found = self._questions(list(rows), tokenizer)
        return [prompt for _, prompt, _ in found], [prompt + reference for _, prompt, reference in found]


def _figure_name(kind: str) -> str:
    return kind.replace("-", "_")


def _cut(text: str, stops: tuple[str, ...]) -> str:
    """`text` up to the first of `stops` in it."""
    ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


class _Told:
    """The progress that `generate` tells, as a task tells it."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def update(self, done: int, total: int, what: str) -> None:
        self.subject.progress(done, total)
