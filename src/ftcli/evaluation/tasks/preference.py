"""Preference: does the model find the better of two answers likelier?"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator

from ftcli.data.messages import Message, bad_row, fields_of, looks_like_messages, read_messages
from ftcli.evaluation.choices import Continuations, check_continuations, score_continuations
from ftcli.evaluation.rows import Rows
from ftcli.evaluation.tasks.columns import checked_template, column, fill, text_column
from ftcli.evaluation.tasks.task import Subject, TaskResult, TaskSettings, mean_figure, share_figure

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer


class Preference(TaskSettings):
    """Pairs of answers to one prompt: accuracy is the share of rows whose chosen answer has the higher log-likelihood.

    Columns hold texts, or conversations (lists of messages, as training reads them), which the model's chat template writes; answers
    are then whole turns with their end. Answers that are whole conversations need no column for the prompt.
    """

    kind: Literal["preference"]
    prompt: Annotated[str, AfterValidator(checked_template)] = "{prompt}"
    """What comes before the answers, with columns in braces."""
    chosen: str = "chosen"
    """Column with the better answer."""
    rejected: str = "rejected"
    """Column with the worse one."""
    separator: str = "\n"
    """What stands between prompt and answer; where a chat template writes them, nothing does."""

    main_figure: ClassVar[str] = "accuracy"

    def check_rows(self, rows: Sequence[tuple[str, dict[str, Any]]], subject: Subject) -> None:
        check_continuations(subject.model, subject.tokenizer, [self._continuations(row, where, subject.tokenizer) for where, row in rows])

    def _continuations(self, row: dict[str, Any], where: str, tokenizer: Tokenizer) -> Continuations:
        if empty := next((name for name in (self.chosen, self.rejected) if _is_empty(column(row, name, where))), None):
            raise bad_row(where, f"column `{empty}` is empty")
        prompt, answers = self._chat(row, where, tokenizer) or (
            fill(self.prompt, row, where),
            [self.separator + text_column(row, name, where) for name in (self.chosen, self.rejected)],
        )
        better, worse = (answer.removeprefix(self.separator).strip() for answer in answers)
        if better == worse:
            what = f"columns `{self.chosen}` and `{self.rejected}` hold the same answer: `{better[:40]}`"
            raise bad_row(where, what)
        return Continuations(prompt, tuple(answers), where)

    def _chat(self, row: dict[str, Any], where: str, tokenizer: Tokenizer) -> tuple[str, list[str]] | None:
        """Prompt and answers as the chat template writes them; None where no column holds a conversation."""
        name = next((one for one in row if self.prompt == f"{{{one}}}"), None)
        answers = [column(row, one, where) for one in (self.chosen, self.rejected)]
        if not any(looks_like_messages(value) for value in (*answers, row.get(name or ""))):
            return None
        asked: list[Message] = []
        if name is not None and isinstance(row[name], list):
            asked = read_messages(row[name], where, name)
        elif name is not None or self.prompt != Preference.model_fields["prompt"].default:
            asked = [_said("user", fill(self.prompt, row, where))]
        said = [
            read_messages(value, where, one) if isinstance(value, list) else [_said("assistant", text_column(row, one, where))]
            for one, value in zip((self.chosen, self.rejected), answers, strict=True)
        ]
        both = [_rendered(asked, one, where, tokenizer) for one in said]
        if both[0][0] != both[1][0]:
            raise bad_row(where, f"columns `{self.chosen}` and `{self.rejected}` do not answer the same prompt")
        return both[0][0], [answer for _, answer in both]

    def measure(self, subject: Subject) -> TaskResult:
        """Accuracy by the sum and by the mean over tokens, and the mean margin in nats."""
        import numpy as np

        samples, margins, per_token, num_cut, num_tokens = Rows(), array("d"), array("d"), 0, 0
        for part, progress in self.parts(subject):
            rows = [self._continuations(row, where, subject.tokenizer) for where, row in part]
            scored = score_continuations(subject.model, subject.tokenizer, rows, batch_tokens=subject.batch_tokens, progress=progress)
            for (where, _), one, (better, worse) in zip(part, rows, scored.likelihoods, strict=True):
                margin = better.log_prob - worse.log_prob
                margins.append(margin)
                per_token.append(better.log_prob / better.num_tokens - worse.log_prob / worse.num_tokens)
                chosen, rejected = (answer.removeprefix(self.separator) for answer in one.choices)
                asked = {"where": where, "prompt": one.context, "chosen": chosen, "rejected": rejected}
                samples.append({**asked, "margin": margin, "accuracy": float(margin > 0)})
            num_cut, num_tokens = num_cut + scored.num_cut, num_tokens + scored.num_tokens
        figures = {
            "accuracy": share_figure((np.array(margins) > 0).astype(np.float64)),
            "accuracy_by_token": share_figure((np.array(per_token) > 0).astype(np.float64)),
            "margin": mean_figure(np.array(margins)),
        }
        notes = [f"{num_cut} prompts lost their beginning: the model sees too few tokens"] if num_cut else []
        return TaskResult(figures, samples, notes, num_tokens)


def _is_empty(answer: Any) -> bool:
    """No text, or a conversation whose last turn says and calls nothing."""
    if not looks_like_messages(answer):
        return not str(answer).strip() if isinstance(answer, str) else answer == []
    last = answer[-1]
    said = last.get("content", last.get("value")) if isinstance(last, Mapping) else None
    calls = isinstance(last, Mapping) and (last.get("tool_calls") or last.get("function_call"))
    return (said is None or (isinstance(said, str) and not said.strip())) and not calls


def _said(role: str, content: str) -> Message:
    return Message({"role": role, "content": content}, 1.0)


def _rendered(asked: Sequence[Message], said: Sequence[Message], where: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """The text that generation starts from, and the last answer with its end of turn, as training would learn it."""
    from ftcli.data.template import chat_example

    has_prompt = bool(asked) and fields_of(said[: len(asked)]) == fields_of(asked)
    pieces = chat_example(said if has_prompt else [*asked, *said], tokenizer, where, turns="last").segments[0].pieces
    place = next((place for place, piece in enumerate(pieces) if not piece.is_prompt), None)
    if place is None:
        raise bad_row(where, "the conversation has no answer of the assistant")
    return "".join(piece.text for piece in pieces[:place]), pieces[place].text
