"""What a recipe may say under `model`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from ftcli.errors import Problem, RequestError
from ftcli.models.add_tokens import AddTokens
from ftcli.models.dtypes import DtypeName
from ftcli.models.grow import Grow
from ftcli.models.rope import Rope
from ftcli.spec import ExpandedName, ModelReference, Spec, TemplateReference

if TYPE_CHECKING:
    from ftcli.models.quantisation import Quantization
    from ftcli.models.tokenizer import Tokenizer


def noted_rope_settings(folder: Path) -> Rope | None:
    """The scaling of positions that an adapter folder was trained with, as a recipe says it.

    Raises:
        RequestError: the note is not one of ftcli's.
    """
    from ftcli.models.fingerprint import noted_rope

    found = noted_rope(folder)
    if found is None:
        return None
    try:
        settings: Rope = TypeAdapter(Rope).validate_python(found)
    except ValidationError as error:
        problem = Problem(str(folder), f"the base's positions are noted in a way that is not understood: {error.errors()[0]['msg']}")
        raise RequestError("the adapter cannot be loaded", [problem]) from error
    return settings


def noted_quantization(folder: Path) -> Quantization | None:
    """How the base was stored under an adapter that was exported; None for as it is.

    Raises:
        RequestError: the note is not one of ftcli's.
    """
    from ftcli.models.fingerprint import noted_storage
    from ftcli.models.quantisation import Quantization

    found = noted_storage(folder)
    try:
        return None if found is None else Quantization.model_validate(found)
    except ValidationError as error:
        problem = Problem(str(folder), f"how its base is stored is noted in a way that is not understood: {error.errors()[0]['msg']}")
        raise RequestError("the adapter cannot be loaded", [problem]) from error


class Init(Spec):
    """A model with random weights, for pre-training and tests."""

    architecture: str
    """Model type of transformers: llama, qwen3, gpt2, ..."""
    config: dict[str, Any] = {}
    """Fields of that architecture's configuration, by their own names."""


class Model(Spec):
    """The base model: one of `base` or `init`."""

    base: ModelReference | None = None
    """builtin:NAME, a local folder, or a hub id."""
    init: Init | None = None
    """Random weights instead of a base; needs `tokenizer`."""
    revision: ExpandedName | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer: ModelReference | None = None
    """Another tokenizer than the base's own: builtin:NAME, a local folder, or a hub id."""
    template: TemplateReference | None = None
    """Chat template: a path to a Jinja file, the template itself, or `chatml` or `plain`. The default is the tokenizer's own."""
    dtype: DtypeName = "auto"
    """Of the weights that are loaded; `auto` is float32 on CPU and for weights that train, else the model's own."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention where the forest layout is not used; `auto` is what the model itself prefers."""
    add_tokens: AddTokens | None = None
    """New tokens for words that the tokenizer cuts into many pieces."""
    grow: Grow | None = None
    """Make the base larger before training, in depth, width or experts."""
    rope: Rope | None = None
    """Scale rotary positions for a longer context."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model: only for authors you trust."""

    def settled_as(self, begun: Model) -> Model:
        """This model with the new tokens that a run which began with it has found, so that the two can be compared."""
        own, theirs = self.add_tokens, begun.add_tokens
        if own is None or own.is_settled or theirs is None:
            return self
        texts = own.known() or (theirs.tokens if len(theirs.tokens) <= (own.mine or 0) else ())
        return self.model_copy(update={"add_tokens": own.settled(texts)}) if texts else self

    def load_tokenizer(self) -> Tokenizer:
        """The named tokenizer, or the base's own, with the recipe's template and new tokens (but for those yet to be mined).

        Raises:
            RequestError: it cannot be had or read, or a token cannot be added.
        """
        from ftcli.models.tokenizer import load_tokenizer

        reference = self.tokenizer or self.base
        if reference is None:
            raise RequestError("model: neither `base` nor `tokenizer` is given")
        base = load_tokenizer(reference, revision=self.revision if self.tokenizer is None else None, template=self.template)
        texts = () if self.add_tokens is None else self.add_tokens.known()
        if not texts:
            return base
        from ftcli.models.extended_tokenizer import check_read_back, extended_folder
        from ftcli.models.tokenizer import cache_folder

        found = load_tokenizer(str(extended_folder(base, texts, cache_folder())))
        check_read_back(found, texts)
        return found
