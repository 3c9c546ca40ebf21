"""A run that begins from another one must read text as that one did: the same new tokens, positions scaled where they were."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftcli.errors import Problem, RequestError
from ftcli.models.added_rows import ROWS_FILE
from ftcli.models.extended_tokenizer import TOKENS_FILE
from ftcli.models.settings import noted_rope_settings

if TYPE_CHECKING:
    from ftcli.recipe.recipe import Recipe
    from ftcli.training.init_from import Origin

_LISTED = 3


def require_same_reading(recipe: Recipe, origin: Origin) -> None:
    """Refuse what would be learnt on with another meaning.

    Other positions than the earlier run's may be asked for, as a longer context; leaving them out is no such wish.

    Raises:
        RequestError: the earlier run scaled its positions and the recipe does not, or its new tokens are not the recipe's.
    """
    theirs = noted_rope_settings(origin.folder) if origin.recipe is None else origin.recipe.model.rope
    if theirs is not None and recipe.model.rope is None:
        dumped = sorted(theirs.model_dump(exclude_none=True).items(), key=lambda item: item[0] != "kind")
        settings = ", ".join(f"{key}: {value}" for key, value in dumped)
        what = f"`{origin.path}` was trained with scaled positions, and the recipe says nothing of them"
        raise _refused("model.rope", what, f"`rope: {{{settings}}}`")
    _require_same_tokens(recipe, origin)


def _require_same_tokens(recipe: Recipe, origin: Origin) -> None:
    if origin.recipe is None:
        if (origin.folder / ROWS_FILE).is_file() and recipe.model.add_tokens is None and recipe.model.tokenizer is None:
            what = f"`{origin.path}` brings new tokens, and the recipe's tokenizer has none"
            raise _refused("model.add_tokens", what, f"`model: {{tokenizer: {origin.folder}}}`")
        return
    settings = origin.recipe.model.add_tokens
    texts = () if settings is None else settings.known()
    if not texts:
        return
    ours, theirs = recipe.model.load_tokenizer(), origin.recipe.model.load_tokenizer()
    other = [text for text in texts if ours.backend.token_to_id(text) != theirs.backend.token_to_id(text)]
    if other:
        listed = ", ".join(f"`{text}`" for text in other[:_LISTED]) + (", ..." if len(other) > _LISTED else "")
        what = f"{len(other)} of {len(texts)} new tokens of `{origin.path}` are not the recipe's, or stand elsewhere: {listed}"
        run = origin.path if (origin.path / TOKENS_FILE).is_file() else origin.folder.parent
        hint = f"`add_tokens: {{file: {run / TOKENS_FILE}}}`" if (run / TOKENS_FILE).is_file() else "the same `add_tokens`"
        raise _refused("model.add_tokens", what, hint)


def _refused(where: str, what: str, hint: str) -> RequestError:
    return RequestError("the run cannot begin from this", [Problem(where, what, hint)])
