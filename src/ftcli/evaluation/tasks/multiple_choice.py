"""Multiple choice: the likeliest of several continuations is the answer."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator

from ftcli.errors import DataError, Problem
from ftcli.evaluation.choices import Continuations, Likelihood, check_continuations, score_continuations
from ftcli.evaluation.rows import ROWS_AT_ONCE, Rows
from ftcli.evaluation.tasks.columns import after_last_column, checked_template, column, fill, texts_column
from ftcli.evaluation.tasks.shots import Examples, Questions, Shots, before_each, embedding_of
from ftcli.evaluation.tasks.task import Subject, TaskResult, TaskSettings, share_figure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ftcli.models.tokenizer import Tokenizer

Normalise = Literal["none", "characters", "bytes", "tokens", "pmi"]
Answers = Literal["auto", "index", "number", "letter", "text"]


class MultipleChoice(TaskSettings):
    """Each row is a question and its choices; the model answers with the choice of the highest log-likelihood.

    Sources: the normalisations are those of lm-evaluation-harness (`acc`, `acc_norm` by characters, `acc_bytes`); by tokens and by
    pointwise mutual information as Holtzman et al. 2021, arXiv:2104.08315, compare them.
    """

    kind: Literal["multiple-choice"]
    question: str = "question"
    """Column with the question."""
    choices: str | tuple[str, ...] = "choices"
    """Column with the list of choices, or the choices themselves where they are the same for all rows: label words."""
    answer: str = "answer"
    """Column with the right choice."""
    answers: Answers = "auto"
    """How the answer names it: `index` counts from 0, `number` from 1, `letter` from A, `text` is the choice word for word. `auto` takes
    a text that is one of the choices for it, and else an index or a letter; a number that is the index of one choice and the text of
    another is refused."""
    prompt: Annotated[str, AfterValidator(checked_template)] | None = None
    """What the model reads, with columns in braces; the default is `{question}` with `Answer:` on a line of its own."""
    separator: str = " "
    """What stands between prompt and choice."""
    normalise: Normalise = "none"
    """What log-likelihoods are divided by before they are compared in `accuracy`; all ways are reported. `pmi` subtracts what a choice has
    without its question: after what `prompt` says behind its last column, such as `Answer:`, and where it says nothing there, at the
    beginning of a text."""
    shots: Shots | None = None
    """Solved examples before every question."""

    main_figure: ClassVar[str] = "accuracy"

    def measure(self, subject: Subject) -> TaskResult:
        """Accuracy under every normalisation, and the mean probability of the right choice among all."""
        import numpy as np

        samples, hits, num_cut, num_tokens, notes = Rows(), {way: array("d") for way in self._ways()}, 0, 0, list[str]()
        for part, progress in self.parts(subject, None if self.shots is not None else ROWS_AT_ONCE):
            read = [(where, *self._read(row, where)) for where, row in part]
            shots = self._shots(part, read, subject)
            notes += shots.notes
            prompts = [shot + prompt for shot, prompt in zip(shots.texts, self.prompts(part, subject.tokenizer), strict=True)]
            rows = self._continuations(prompts, read)
            scored = score_continuations(subject.model, subject.tokenizer, rows, batch_tokens=subject.batch_tokens, progress=progress)
            apart = self._without_context(subject, rows) if self.normalise == "pmi" else None
            chosen = {way: self._chosen(way, rows, scored.likelihoods, apart) for way in self._ways()}
            for way, picked in chosen.items():
                hits[way].extend(float(choice == answer) for choice, (_, _, answer) in zip(picked.tolist(), read, strict=True))
            for index, (prompt, (where, choices, answer)) in enumerate(zip(prompts, read, strict=True)):
                likelihoods = [one.log_prob for one in scored.likelihoods[index]]
                best = int(chosen[self.normalise][index])
                said = {"choices": choices, "answer": answer, "chosen": best, "log_likelihoods": likelihoods}
                samples.append({"where": where, "prompt": prompt, **said, "accuracy": float(best == answer)})
            num_cut, num_tokens = num_cut + scored.num_cut, num_tokens + scored.num_tokens
        figures = {_NAMES[way]: share_figure(np.array(values)) for way, values in hits.items()}
        figures = {"accuracy": figures[_NAMES[self.normalise]], **figures}
        notes += [f"{num_cut} contexts lost their beginning: the model sees too few tokens"] if num_cut else []
        return TaskResult(figures, samples, notes, num_tokens)

    def check_rows(self, rows: Sequence[tuple[str, dict[str, Any]]], subject: Subject) -> None:
        prompts = self.prompts(rows, subject.tokenizer)
        read = [(where, *self._read(row, where)) for where, row in rows]
        check_continuations(subject.model, subject.tokenizer, self._continuations(prompts, read))

    def _continuations(self, prompts: Sequence[str], read: Sequence[tuple[str, list[str], int]]) -> list[Continuations]:
        """What is scored: the choices after each prompt."""
        return [
            Continuations(prompt, tuple(self.separator + choice for choice in choices), where)
            for prompt, (where, choices, _) in zip(prompts, read, strict=True)
        ]

    def _shots(self, rows: Sequence[tuple[str, dict[str, Any]]], read: Sequence[tuple[str, list[str], int]], subject: Subject) -> Examples:
        """The solved examples before each prompt."""

        def answered(prompts: list[str], read: Sequence[tuple[str, list[str], int]], bare: Sequence[str] = ()) -> Questions:
            solved = [prompt + self.separator + choices[answer] for prompt, (_, choices, answer) in zip(prompts, read, strict=True)]
            return Questions([where for where, _, _ in read], prompts, solved, bare)

        def solved(rows: Sequence[tuple[str, dict[str, Any]]]) -> Questions:
            return answered(self.prompts(rows, subject.tokenizer), [(where, *self._read(row, where)) for where, row in rows])

        bare = self.bare_prompts(subject.tokenizer) if self.shots is not None else ()
        return before_each(self.shots, answered(self.prompts(rows, subject.tokenizer), read, bare), solved, embedding_of(subject))

    def _ways(self) -> list[Normalise]:
        return ["none", "characters", "bytes", "tokens", *(["pmi"] if self.normalise == "pmi" else [])]  # type: ignore[list-item]

    def _read(self, row: dict[str, Any], where: str) -> tuple[list[str], int]:
        """The choices of a row, and the index of the right one.

        Raises:
            DataError: there is nothing to choose between, or the answer is none of the choices.
        """
        choices = list(self.choices) if isinstance(self.choices, tuple) else texts_column(row, self.choices, where)
        if problem := _not_choices(choices):
            raise DataError(
                "a row cannot be read", [Problem(where, f"{problem}: {_listed(choices)}", "two choices or more, all different")]
            )
        return choices, answer_index(column(row, self.answer, where), choices, where, self.answer, self.answers)

    def prompts(self, rows: Sequence[tuple[str, dict[str, Any]]], tokenizer: Tokenizer) -> list[str]:
        return [fill(self._template, row, where) for where, row in rows]

    @property
    def _template(self) -> str:
        return self.prompt or f"{{{self.question}}}\nAnswer:"

    def _without_context(self, subject: Subject, rows: Sequence[Continuations]) -> list[list[Likelihood]]:
        """Likelihoods of the choices after no question at all, but with what stands between it and them."""
        premise = after_last_column(self._template).strip()
        bare = [Continuations(premise, row.choices, row.where) for row in rows]
        return score_continuations(subject.model, subject.tokenizer, bare, batch_tokens=subject.batch_tokens).likelihoods

    def _chosen(
        self, way: Normalise, rows: Sequence[Continuations], found: list[list[Likelihood]], apart: list[list[Likelihood]] | None
    ) -> NDArray[np.int64]:
        """(n,) index of each row's best choice; of equal ones the first."""
        import numpy as np

        picked = []
        for index, (row, likelihoods) in enumerate(zip(rows, found, strict=True)):
            bare = [choice.removeprefix(self.separator) for choice in row.choices]
            totals = np.array([one.log_prob for one in likelihoods])
            sizes = {
                "characters": [max(1, len(choice)) for choice in bare],
                "bytes": [max(1, len(choice.encode())) for choice in bare],
                "tokens": [one.num_tokens for one in likelihoods],
            }.get(way)
            if sizes is not None:
                totals = totals / np.array(sizes)
            elif way == "pmi" and apart is not None:
                totals = totals - np.array([one.log_prob for one in apart[index]])
            picked.append(int(totals.argmax()))
        return np.array(picked)


_NAMES = {
    "none": "accuracy_by_sum",
    "characters": "accuracy_by_character",
    "bytes": "accuracy_by_byte",
    "tokens": "accuracy_by_token",
    "pmi": "accuracy_by_pmi",
}


def answer_index(value: Any, choices: Sequence[str], where: str, name: str, answers: Answers = "auto") -> int:
    """Which of the choices `value` means, read as `answers` says.

    Raises:
        DataError: none of them, two of them equal, or one by its index and another by its text.

    Example:
        >>> [answer_index(value, ["red", "blue"], "a:1", "answer") for value in ("blue", 1, "B", "1")]
        [1, 1, 1, 1]
        >>> answer_index(2, ["3", "2", "1"], "a:1", "answer", "number")
        1
    """
    text = str(value).strip()
    number = int(text) if text.isdecimal() and not isinstance(value, bool) else -1
    letter = ord(text.upper()) - ord("A") if len(text) == 1 and text.isalpha() else -1
    equal = [index for index, choice in enumerate(choices) if choice.strip() == text]
    ways = {"text": equal[0] if equal else -1, "index": number, "letter": letter, "number": number - 1}
    asked = ("text", "index", "letter") if answers == "auto" else (answers,)
    meant = {way: ways[way] for way in asked if 0 <= ways[way] < len(choices)}
    if isinstance(value, int) and {"text", "index"} <= meant.keys() and meant["text"] != meant["index"]:
        what = f"column `{name}`: {text} is the index of `{choices[number][:40]}`, counted from 0, and the text of another choice"
        raise DataError("a row cannot be read", [Problem(where, what, "say which with `answers: index` or `answers: text`")])
    if meant:
        return next(iter(meant.values()))
    kind = "" if answers == "auto" else f" as {answers}"
    problem = Problem(where, f"column `{name}`: `{text}` is none of the choices{kind}", f"choices: {_listed(choices)}")
    raise DataError("a row cannot be read", [problem])


def _not_choices(choices: Sequence[str]) -> str | None:
    """Why a model cannot choose between these; None where it can."""
    bare = [choice.strip() for choice in choices]
    if len(bare) < 2:
        return "there is one choice alone"
    if not all(bare):
        return f"choice {bare.index('')} (counted from 0) is empty"
    twice = next((choice for choice in bare if bare.count(choice) > 1), None)
    return None if twice is None else f"the choice `{twice[:40]}` stands there twice"


def _listed(choices: Sequence[str]) -> str:
    return ", ".join(f"`{choice[:40]}`" for choice in choices[:8])
