"""Chats: OpenAI `messages` and ShareGPT `conversations`, with system prompts, tools and weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from ftcli.data.example import Example
from ftcli.data.messages import Message, column_of, looks_like_messages, read_messages, read_text, read_tools, read_weight
from ftcli.data.template import chat_example
from ftcli.spec import Spec

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer

_COLUMNS = ("messages", "conversations", "conversation", "chat", "dialog")


class Chat(Spec):
    """A row is a conversation: a list of messages with a role and a content, rendered by the model's chat template.

    Roles: system, developer, user, assistant, tool, and what ShareGPT calls them (human, gpt, ...). An assistant turn may carry
    `train: false` or a `weight`.
    """

    kind: Literal["chat"] = "chat"
    messages: str = "messages"
    """Column with the list of messages."""
    system: str | None = "system"
    """Column with a system prompt, where rows have one; used when the messages do not begin with one."""
    tools: str | None = "tools"
    """Column with the tools the row offers, where rows have one."""
    weight: str | None = "weight"
    """Column with the weight of the row, where rows have one; null reads none."""
    turns: Literal["all", "last"] = "all"
    """Which answers are trained: `all` of them, or the `last` one, with the ones before it as its prompt."""

    @classmethod
    def detect(cls, columns: Collection[str], rows: Sequence[Mapping[str, Any]]) -> Self | None:
        """The settings that would read these rows, None when they are no chats."""
        for column in _COLUMNS:
            if column in columns and any(looks_like_messages(row.get(column)) for row in rows):
                return cls(messages=column)
        return None

    def required_columns(self) -> tuple[str, ...]:
        return (self.messages,)

    def optional_columns(self) -> tuple[str, ...]:
        return tuple(column for column in (self.system, self.tools, self.weight) if column is not None)

    def example(self, row: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> Example:
        """The row as an example.

        Raises:
            DataError: it is no conversation, or the template refuses it.
        """
        messages = read_messages(column_of(row, self.messages, where), where, self.messages)
        if self.system is not None and row.get(self.system) and messages[0].fields["role"] != "system":
            messages.insert(0, Message(fields={"role": "system", "content": read_text(row, self.system, where)}, weight=1.0))
        tools = read_tools(row.get(self.tools), where, self.tools) if self.tools is not None else None
        weight = read_weight(row.get(self.weight), where, f"column `{self.weight}`") if self.weight is not None else 1.0
        return chat_example(messages, tokenizer, where, tools=tools, weight=weight, turns=self.turns)
