"""Which parts of a rendered conversation are answers, found by rendering its beginnings.

The answer of turn k is what the template adds to the prompt of turn k, which is the text that generation starts from. So what is
trained is what will be generated, for every template, without marks in it. A template that writes the beginning of a conversation
differently once it goes on has no such answer, and is refused with the place where the two texts part.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ftcli.data.example import Example, Piece, path_example
from ftcli.data.messages import Message, fields_of
from ftcli.errors import DataError, Problem, RequestError

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer

Turns = Literal["all", "last"]
Fields = Sequence[Mapping[str, Any]]
# Two words that no template writes by itself; where two renderings part tells what the template adds.
_PROBES = ("zebra", "quilt")
_LONG_ENOUGH = 20


def chat_example(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    where: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    weight: float = 1.0,
    turns: Turns = "all",
) -> Example:
    """A conversation as an example: every answer trained up to its end-of-turn token, all the rest prompt.

    Args:
        messages: the conversation.
        where: the row, for errors.
        tools: the tools it offers.
        weight: of the row, a factor on all of it.
        turns: `last` trains the last answer only.

    Returns:
        an example without pieces where no answer is to be trained.

    Raises:
        DataError: the template refuses the conversation or rewrites its beginning.
        RequestError: there is no template, or it ends no turn.
    """
    if tokenizer.chat_template is None:
        raise tokenizer.no_template()
    if tokenizer.end_of_turn is None:
        raise _no_end_of_turn()
    answers = [index for index, message in enumerate(messages) if message.is_answer]
    answers = answers[-1:] if turns == "last" else answers
    if not any(messages[index].weight > 0 for index in answers):
        return path_example([], add_bos=False)
    try:
        return _pieces(messages, answers, tokenizer, tools, weight)
    except DataError as error:
        raise DataError(error.summary, [Problem(where, problem.what, problem.hint) for problem in error.problems], error.hint) from error


def _pieces(
    messages: Sequence[Message], answers: Sequence[int], tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]] | None, weight: float
) -> Example:
    fields = fields_of(messages)
    text = tokenizer.render(fields, tools)
    pieces: list[Piece] = []
    position = 0
    for index in answers:
        start, end = _answer_span(fields, index, text, tokenizer, tools)
        if start < position:
            raise _rewritten(index, len(fields), text[start:], text[position:])
        pieces.append(Piece(text[position:start], weight, is_prompt=True))
        pieces.append(Piece(text[start:end], weight * messages[index].weight, is_prompt=False))
        position = end
    pieces.append(Piece(text[position:], weight, is_prompt=True))
    _refuse_dropped(fields, text, tokenizer, tools)
    return path_example(pieces, add_bos=False)


def _answer_span(fields: Fields, index: int, text: str, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]] | None) -> tuple[int, int]:
    """(start, end) of an answer in the text of the whole conversation, with its end-of-turn token and not what follows it."""
    through = text if index == len(fields) - 1 else tokenizer.render(fields[: index + 1], tools)
    start = _answer_start(fields[:index], through, tokenizer, tools)
    if text[:start] != through[:start]:
        raise _rewritten(index, len(fields), text, through)
    shared = start + len(_shared(text[start:], through[start:]))
    end = _answer_end(through, start, tokenizer)
    if end is None:
        raise _no_end(index, through[start:], tokenizer)
    if end > shared:
        raise _rewritten(index, len(fields), text, through)
    is_said = fields[index]["content"].strip() or fields[index].get("tool_calls")
    if is_said and not _without_end(through[start:end], tokenizer).strip():
        raise _dropped(f"message {index + 1}, an answer")
    return start, end


def _answer_start(before: Fields, through: str, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]] | None) -> int:
    """Where the answer begins: after the prompt that generation starts from, as far as the template writes it before an answer, too.

    A generation prompt may go further, to open a block of thoughts, than what stands before an answer; then the part
    that stands before any answer counts.
    """
    try:
        prompt = tokenizer.render(before, tools, add_generation_prompt=True)
    except DataError:
        if before:
            raise
        # Some templates cannot write a conversation of no messages, so one that begins with an answer has no prompt of its own.
        prompt = None
    if prompt is not None and through.startswith(prompt):
        return len(prompt)
    probes = [tokenizer.render([*before, {"role": "assistant", "content": word}], tools) for word in _PROBES]
    if prompt is None:
        return len(_shared(*probes, through))
    header = _shared(*probes, prompt)
    conversation = _shared(tokenizer.render(before, tools), prompt)
    if not through.startswith(header) or len(header) < len(conversation):
        raise _rewritten(len(before), len(before) + 1, through, prompt)
    return len(header)


def _answer_end(through: str, start: int, tokenizer: Tokenizer) -> int | None:
    """End of the end-of-turn token in a text that ends with an answer; None where there is none after `start`."""
    end_of_turn = tokenizer.end_of_turn or ""
    at = through.rfind(end_of_turn, start)
    written = through.rstrip()
    other = next((token for token in tokenizer.added_texts if token and written.endswith(token)), None)
    # A turn may end otherwise than usual, such as a call of a tool with a token of its own.
    if other is not None and (at < 0 or (other != end_of_turn and through[at + len(end_of_turn) : len(written) - len(other)].strip())):
        return len(written) if len(written) - len(other) >= start else None
    return at + len(end_of_turn) if at >= 0 else None


def _refuse_dropped(fields: Fields, text: str, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]] | None) -> None:
    """Refuse a template that leaves out part of the conversation: it changes nothing in the text when that part changes.

    Many templates ignore tools, calls, or the results of calls; the answers would then be trained without what they rest on.
    """
    for index, message in enumerate(fields):
        content = message["content"].strip()
        # A few letters may stand in the text by chance
        is_seen = content in text and (len(content) > _LONG_ENOUGH or message["role"] in ("user", "assistant"))
        if not is_seen and text == tokenizer.render(_replaced(fields, index, {"content": _PROBES[0]}), tools):
            raise _dropped(f"message {index + 1}, of role `{message['role']}`")
        calls = message.get("tool_calls")
        if calls and calls[0]["function"]["name"] not in text:
            raise _dropped(f"the tool calls of message {index + 1}")
    if tools and text == tokenizer.render(fields):
        raise _dropped("the tools")


def _replaced(fields: Fields, index: int, changed: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [{**message, **changed} if at == index else message for at, message in enumerate(fields)]


def _dropped(what: str) -> DataError:
    hint = "use a `model.template` that writes it, such as `chatml` or `plain`, or take it out of the rows"
    return DataError("the chat template drops part of a conversation", [Problem("", f"the chat template leaves out {what}", hint)])


def _shared(first: str, *others: str) -> str:
    """The beginning that all texts share."""
    for other in others:
        if not other.startswith(first):
            first = first[: bisect_left(range(len(first) + 1), True, key=lambda length: not other.startswith(first[:length])) - 1]
    return first


def _without_end(piece: str, tokenizer: Tokenizer) -> str:
    return next((piece[: -len(end)] for end in (*tokenizer.end_texts, *tokenizer.added_texts) if end and piece.endswith(end)), piece)


def end_of_turn(tokenizer: Tokenizer) -> str | None:
    """The text with which the template ends an assistant turn: its first special token after the answer.

    None when there is no template, or it refuses a simple question and answer, or writes nothing after an answer.
    """
    question = {"role": "user", "content": _PROBES[0]}
    try:
        answered = [tokenizer.render([question, {"role": "assistant", "content": word}]) for word in _PROBES]
    except RequestError:
        return None
    tails = [text[text.rfind(word) + len(word) :] for text, word in zip(answered, _PROBES, strict=True)]
    if tails[0] != tails[1]:
        return None
    found = [(tails[0].find(token), -len(token), token) for token in tokenizer.added_texts if token and token in tails[0]]
    return min(found)[2] if found else tails[0].strip() or None


def _no_end_of_turn() -> RequestError:
    hint = "write `{{ eos_token }}` after an answer in the template, or use `model.template: plain`"
    what = "the chat template writes no end-of-turn token after an answer, so the model would not learn to stop"
    return RequestError("the chat template cannot be trained with", [Problem("model.template", what, hint)])


def _rewritten(index: int, num_messages: int, text: str, beginning: str) -> DataError:
    """The error for a template that writes what stands before an answer, or the answer, differently once the conversation goes on."""
    at = len(_shared(text, beginning))
    what = (
        f"the chat template is not prefix-preserving: up to message {index + 1} it writes {beginning[at : at + 40]!r} at character {at}, "
        f"and {text[at : at + 40]!r} once the conversation goes on, so training would show another text than generation"
    )
    goes_on = index + 1 < num_messages
    hint = "`format.turns: last` trains the last answer only" if goes_on else "use another `model.template`, such as `chatml` or `plain`"
    return DataError("the chat template is not prefix-preserving", [Problem("", what, hint)])


def _no_end(index: int, written: str, tokenizer: Tokenizer) -> DataError:
    what = f"message {index + 1} has no end-of-turn token `{tokenizer.end_of_turn}`; the template ends it with {written[-40:]!r}"
    return DataError("an answer does not end", [Problem("", what, "a model trained on this would not stop; use another `model.template`")])
