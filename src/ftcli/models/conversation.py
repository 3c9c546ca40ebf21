"""A conversation that grows turn by turn and is kept short enough for the model's context."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ftcli.models.generate import prompt_ids

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer


@dataclass(slots=True)
class Conversation:
    """Turns of user and assistant after an optional system text.

    Args:
        tokenizer: must have a chat template.
    """

    tokenizer: Tokenizer
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> None:
        """The user's turn."""
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """The assistant's turn."""
        self.turns.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Forget the last turn."""
        self.turns.pop()

    def reset(self) -> None:
        """Forget every turn; the system text stays."""
        self.turns.clear()

    def prompt(self) -> str:
        """All of it as text, up to where the assistant is to go on."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.tokenizer.render([*system, *self.turns], add_generation_prompt=True)

    def drop_to_fit(self, max_tokens: int | None) -> int:
        """Forget the oldest questions with their answers until the prompt has at most `max_tokens`; the last question stays.

        Returns:
            How many turns were forgotten.
        """
        dropped = 0
        while max_tokens is not None and len(self.turns) > 1 and len(prompt_ids(self.tokenizer, self.prompt())) > max_tokens:
            oldest = next((index for index, turn in enumerate(self.turns) if index and turn["role"] == "user"), len(self.turns) - 1)
            del self.turns[:oldest]
            dropped += oldest
        return dropped
