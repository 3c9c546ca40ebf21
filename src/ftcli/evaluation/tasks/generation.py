"""Generation: answers written by the model, compared with references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from ftcli.data.formats import Format
from ftcli.data.messages import looks_like_messages
from ftcli.errors import DataError, Problem
from ftcli.evaluation.answer_scores import AnswerScores, Told
from ftcli.evaluation.rows import ROWS_AT_ONCE, in_parts
from ftcli.evaluation.tasks.columns import kind_of, texts_column
from ftcli.evaluation.tasks.shots import Questions, Shots, before_each, embedding_of, solved_text
from ftcli.evaluation.tasks.task import Progress, Subject, TaskResult, TaskSettings
from ftcli.metrics import Metric
from ftcli.metrics.metric import without_doubles

if TYPE_CHECKING:
    from ftcli.models.generate import Answer
    from ftcli.models.tokenizer import Tokenizer

# Columns that hold the answer where the format is found from them.
_ANSWERS = ("completion", "response", "answer", "output")


class Generation(TaskSettings):
    """The model answers the prompt of each row; greedy unless a temperature is given."""

    kind: Literal["generation"]
    format: Format | None = None
    """How a row becomes prompt and reference; left out, it is detected from the columns."""
    references: str | None = None
    """Column with more right answers, a text or a list of them. The answer's own column may hold a list, too: the best match counts."""
    metrics: Annotated[tuple[Metric, ...], AfterValidator(without_doubles)] = Field(min_length=1)
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
        """Every metric, those of the user, and the share of answers that the model ended by itself."""
        scores = AnswerScores(self.metrics, subject.user_metrics)
        settings, left, num_tokens, notes = self.format, 0, 0, list[str]()
        for part, progress in self.parts(subject, None if self.shots is not None else ROWS_AT_ONCE):
            settings = settings or self._detected(part)
            found = self._questions(part, subject.tokenizer, settings)
            asked = _asked(found, subject.tokenizer, self.bare_prompts(subject.tokenizer) if self.shots is not None else ())
            shots = before_each(self.shots, asked, lambda rows: self._solved(rows, subject.tokenizer), embedding_of(subject))
            notes += shots.notes
            prompts = [before + prompt for before, prompt in zip(shots.texts, asked.prompts, strict=True)]
            answers = self._answers(subject, prompts, progress)
            left += sum(answer is None for answer in answers)
            num_tokens += sum(len(answer.tokens) for answer in answers if answer is not None)
            for (where, row), (_, _, reference), prompt, answer in zip(part, found, prompts, answers, strict=True):
                text, ended = (None, False) if answer is None else (answer.text, answer.stopped)
                scores.add(where, row, prompt, text, self._references(row, where, reference), ended)
        notes += [f"{left} prompts leave no room for an answer: they count as wrong"] if left else []
        return TaskResult(scores.figures(), scores.rows, notes, num_tokens)

    def check(self, subject: Subject) -> None:
        settings = self.format
        for part in in_parts(self.read_rows(), ROWS_AT_ONCE):
            if self.variants is None and self.retrieve is None:
                settings = settings or self._detected(part)
                found = self._questions(part, subject.tokenizer, settings)
                for (where, row), (_, _, reference) in zip(part, found, strict=True):
                    self._references(row, where, reference)

    def _answers(self, subject: Subject, prompts: list[str], progress: Progress) -> list[Answer | None]:
        """An answer to each prompt; None where it leaves no room for one in the model's context."""
        from ftcli.models.generate import Sampling, context_length, generate, prompt_ids

        context = context_length(subject.model.module)
        fits = [context is None or len(prompt_ids(subject.tokenizer, prompt)) < context for prompt in prompts]
        asked = [prompt for prompt, has_room in zip(prompts, fits, strict=True) if has_room]
        answers = iter(
            generate(
                subject.model.module,
                subject.tokenizer,
                asked,
                max_new_tokens=self.max_new_tokens,
                sampling=Sampling(self.temperature, seed=self.seed),
                stop=self.stop,
                progress=Told(progress),
            )
        )
        return [next(answers) if has_room else None for has_room in fits]

    def _detected(self, rows: Sequence[tuple[str, dict[str, Any]]]) -> Format:
        from ftcli.data.formats.detect import detect_format

        return detect_format([_with_one_reference(row, self.format, where) for where, row in rows[:64]], f"task `{self.name}`")

    def _references(self, row: dict[str, Any], where: str, reference: str) -> list[str]:
        """Every answer that is right: those of a column that holds a list, and those of the column for more."""
        listed = next((row[name] for name in _answer_columns(self.format) if _is_list_of_texts(row.get(name))), [reference])
        more = texts_column(row, self.references, where) if self.references is not None else []
        return [*listed, *more]

    def _questions(
        self, rows: Sequence[tuple[str, dict[str, Any]]], tokenizer: Tokenizer, settings: Format | None = None
    ) -> list[tuple[str, str, str]]:
        """(where, prompt, reference) of every row; of several references the first.

        Raises:
            DataError: a row has nothing to be asked, or no answer.
        """
        from ftcli.data.example import question_of

        settings = settings or self.format or self._detected(rows)
        found = []
        for where, row in rows:
            example = settings.example(_with_one_reference(row, settings, where), tokenizer, where)
            prompt, reference = question_of(example, tokenizer.end_texts)
            if not prompt or not reference:
                raise DataError(
                    f"task `{self.name}`", [Problem(where, "the row has no prompt with an answer", "a text alone is no question")]
                )
            found.append((where, prompt, reference))
        return found

    def prompts(self, rows: Any, tokenizer: Tokenizer) -> list[str]:
        return [prompt for _, prompt, _ in self._questions(list(rows), tokenizer)]

    def _solved(self, rows: Any, tokenizer: Tokenizer) -> Questions:
        return _asked(self._questions(list(rows), tokenizer), tokenizer)


def _asked(found: Sequence[tuple[str, str, str]], tokenizer: Tokenizer, bare: Sequence[str] = ()) -> Questions:
    """(where, prompt, reference) of rows as examples are chosen among them."""
    solved = [solved_text(prompt, reference, tokenizer) for _, prompt, reference in found]
    return Questions([where for where, _, _ in found], [prompt for _, prompt, _ in found], solved, bare)


def _answer_columns(settings: Format | None) -> tuple[str, ...]:
    """Columns that may hold the reference."""
    named = (getattr(settings, "completion", None), getattr(settings, "output", None))
    return _ANSWERS if settings is None else tuple(name for name in named if name is not None)


def _not_texts(row: dict[str, Any], settings: Format | None) -> Problem | None:
    """What is wrong with the column of the answer, where it holds neither a text nor a list of texts, nor a chat."""
    # Where the format is yet to be found, it is found by the first of these columns; a chat brings its answer with it.
    name = next((name for name in _answer_columns(settings) if name in row), None)
    if name is None or (settings is None and any(looks_like_messages(value) for value in row.values())):
        return None
    value = row[name]
    if isinstance(value, str) or looks_like_messages(value) or _is_list_of_texts(value):
        return None
    if isinstance(value, list):
        odd = next((kind_of(item) for item in value if not isinstance(item, str)), None)
        what = "is an empty list" if odd is None else f"holds {odd} among its answers, not a text"
    elif settings is not None or name in ("completion", "output"):  # by these a format is found, whatever they hold
        what = f"is {kind_of(value)}, not a text"
    else:
        return None
    return Problem("", f"column `{name}` {what}", "a text, or a list of right answers, one at least")


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _with_one_reference(row: dict[str, Any], settings: Format | None, where: str) -> dict[str, Any]:
    """`row` as a format reads it: of a list of right answers the first.

    Raises:
        DataError: it is neither text nor list, or the list is empty or holds something else than texts.
    """
    if (problem := _not_texts(row, settings)) is not None:
        raise DataError("a row cannot be read", [replace(problem, where=where)])
    listed = {name: row[name][0] for name in _answer_columns(settings) if _is_list_of_texts(row.get(name))}
    return {**row, **listed} if listed else row
