"""New tokens of a run: found in its data where the recipe says `mine`, and what they save."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ftcli.errors import Problem, RequestError
from ftcli.models.mine_tokens import MinedToken, count_words, mine_tokens

if TYPE_CHECKING:
    from ftcli.models.settings import Model
    from ftcli.models.tokenizer import Tokenizer
    from ftcli.recipe.recipe import Recipe

MAX_MINED_CHARS = 200_000_000
MAX_MEASURED_CHARS = 2_000_000
_IN_A_LINE = 12


@dataclass(frozen=True, slots=True)
class NewTokens:
    """The tokens a run adds, and how many tokens a byte of its training texts is with and without them."""

    texts: tuple[str, ...]
    tokens_per_byte_before: float
    tokens_per_byte_after: float
    mined: tuple[MinedToken, ...] = ()
    described_in_vain: tuple[str, ...] = ()
    """What the recipe describes and the data has not brought forth."""

    def lines(self) -> list[str]:
        """For people: the tokens, and what they save."""
        before, after = self.tokens_per_byte_before, self.tokens_per_byte_after
        change = 0.0 if before == 0 else 1 - after / before
        total = f"{len(self.texts)} new tokens: {before:.3f} tokens per byte of training text become {after:.3f} ({change:.1%} fewer)"
        words = [f"`{token.text.strip()}` saves {token.saved} ({token.count} x {token.pieces} pieces)" for token in self.mined]
        shown = (words[start : start + _IN_A_LINE] for start in range(0, len(words), _IN_A_LINE))
        unread = [f"`model.add_tokens.descriptions` has `{token}`, which is not among them" for token in self.described_in_vain]
        return [total, *(f"mined: {', '.join(part)}" for part in shown), *unread]

    def summary(self) -> dict[str, Any]:
        """For the run's summary: how many, and what they save."""
        return {
            "count": len(self.texts),
            "tokens_per_byte": {"before": round(self.tokens_per_byte_before, 4), "after": round(self.tokens_per_byte_after, 4)},
        }

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def settle_tokens(recipe: Recipe, first_rows: int | None = None) -> tuple[Recipe, NewTokens | None]:
    """The recipe with its new tokens by name, and what they save; the recipe itself where it adds none.

    Raises:
        RequestError: no word of the training texts would save anything, or the data cannot be read.
    """
    settings = recipe.model.add_tokens
    if settings is None:
        return recipe, None
    base = recipe.model.model_copy(update={"add_tokens": None}).load_tokenizer()
    mined: tuple[MinedToken, ...] = ()
    texts = settings.known()
    if settings.mine is not None:
        counts = count_words(_limited(_texts(recipe, base, first_rows), MAX_MINED_CHARS))
        mined = tuple(mine_tokens(counts, base, settings.mine))
        texts = tuple(token.text for token in mined)
        if not texts:
            what = "no word that stands behind a space in the training texts would save a token"
            hint = "leave `add_tokens` out, or name `tokens`; `leading_space: false` for words at the start of lines"
            raise RequestError("tokens cannot be added", [Problem("model.add_tokens.mine", what, hint)])
    model = recipe.model if settings.is_settled else recipe.model.model_copy(update={"add_tokens": settings.settled(texts)})
    recipe = recipe.model_copy(update={"model": model})
    before, after = _tokens_per_byte(recipe, base, model, first_rows)
    return recipe, NewTokens(texts, before, after, mined, tuple(settings.described_in_vain(texts)))


def _tokens_per_byte(recipe: Recipe, base: Tokenizer, model: Model, first_rows: int | None) -> tuple[float, float]:
    extended = model.load_tokenizer()
    num_bytes, before, after = 0, 0, 0
    for text in _limited(_texts(recipe, base, first_rows), MAX_MEASURED_CHARS):
        num_bytes += len(text.encode())
        before += len(base.encode(text)[0])
        after += len(extended.encode(text)[0])
    return before / max(1, num_bytes), after / max(1, num_bytes)


def _texts(recipe: Recipe, tokenizer: Tokenizer, first_rows: int | None) -> Iterator[str]:
    """The texts of the sources with `role: new`: what is replayed is known to the base and its tokenizer."""
    from ftcli.data.prepare import training_texts

    return training_texts(recipe.data, tokenizer, first_rows=first_rows, formats=recipe.objective.formats)


def _limited(texts: Iterator[str], num_chars: int) -> Iterator[str]:
    for text in texts:
        if num_chars <= 0:
            return
        yield text[:num_chars]
        num_chars -= len(text)
