"""What a recipe may say under `model`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ftcli.errors import RequestError
from ftcli.spec import ExpandedName, ModelReference, Spec, TemplateReference

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


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
    trust_remote_code: bool = False
    """Run Python code that comes with the model: only for authors you trust."""

    def load_tokenizer(self) -> Tokenizer:
        """The named tokenizer, or the base's own, with the recipe's template.

        Raises:
            RequestError: it cannot be had or read.
        """
        from ftcli.models.tokenizer import load_tokenizer

        reference = self.tokenizer or self.base
        if reference is None:
            raise RequestError("model: neither `base` nor `tokenizer` is given")
        return load_tokenizer(reference, revision=self.revision if self.tokenizer is None else None, template=self.template)
