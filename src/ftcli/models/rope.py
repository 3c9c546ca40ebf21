"""Longer contexts by scaling rotary positions: set in the configuration before the model is built, and saved with it.

Scaling alone lets the model read positions it has never seen; it is training on long examples afterwards that makes it use them.
What the model loses on short texts is worth watching: evaluate with a source of `role: retained`.
"""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ftcli.errors import Problem, RequestError
from ftcli.spec import Spec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_REPLACEABLE = ("default", "linear", "dynamic", "yarn", "llama3")
_KEPT = ("rope_theta", "partial_rotary_factor", "mrope_section")
_FULL = "full_attention"


class RopeScaling(Spec, ABC):
    """How positions beyond the original context are made to look like known ones."""

    factor: float = Field(gt=1)
    """Context after scaling over the context that the base was trained with; a larger value reads longer texts, less sharply."""

    lengthens: ClassVar[bool] = True
    """Examples as long as the new context may be trained on."""

    def apply(self, config: PretrainedConfig) -> str:
        """Set the scaling in `config` and say what it was and is, in a few words.

        Raises:
            RequestError: the architecture has no rotary positions, or the base's own scaling cannot be replaced.
        """
        text = config.get_text_config()
        rope = getattr(text, "rope_parameters", None)
        if not rope:
            what = f"a `{text.model_type}` has no rotary positions to scale"
            raise _unfit("kind", what, "another base, such as a llama, qwen or mistral")
        # Layers that see a window only never meet a far position.
        inner = rope.get(_FULL) if "rope_type" not in rope and isinstance(rope.get(_FULL), dict) else rope
        found, original = str(inner.get("rope_type", "default")), self._original(inner, text)
        context = round(original * self.factor)
        if context < text.max_position_embeddings:
            what = f"{self.factor:g} times the original {original} tokens is {context}, and the base reads {text.max_position_embeddings}"
            raise _unfit("factor", what, f"at least {text.max_position_embeddings / original:g}")
        scaled = {name: inner[name] for name in _KEPT if name in inner} | self._fields(original)
        text.rope_parameters = scaled if inner is rope else {**rope, _FULL: scaled}
        if self.lengthens:
            text.max_position_embeddings = context
        else:
            text.max_position_embeddings = original
        return f"{found} to {scaled['rope_type']}, factor {self.factor:g}: {original} to {context} tokens"

    def _fields(self, original: int) -> dict[str, Any]:
        """The rotary parameters by the names of transformers."""
        own = {name: value for name, value in self.model_dump().items() if name != "kind" and value is not None}
        return {"rope_type": getattr(self, "kind", ""), **own}

    def _original(self, inner: dict[str, Any], text: PretrainedConfig) -> int:
        """Tokens of the context before any scaling."""
        found = str(inner.get("rope_type", "default"))
        if found not in _REPLACEABLE:
            raise _unfit("kind", f"the base scales its positions by `{found}`, with tables that were trained", "leave `model.rope` out")
        known = inner.get("original_max_position_embeddings")
        if known is None and found == "linear":
            what = f"the base is scaled already (linear, {inner.get('factor')}), and its configuration does not say from how many tokens"
            raise _unfit("kind", what, "leave `model.rope` out, or begin from the base before scaling")
        return int(known or text.max_position_embeddings)


class RopeLinear(RopeScaling):
    """All positions divided by the factor: simple, and all texts look different to the base, short ones, too.

    Source: Chen et al. 2023 (position interpolation), arXiv:2306.15595, section 2.3.
    """

    kind: Literal["linear"] = "linear"

    def _fields(self, original: int) -> dict[str, Any]:
        return {**super()._fields(original), "original_max_position_embeddings": original}


class RopeDynamic(RopeScaling):
    """The base of the frequencies grows with the longest text at hand, from the original context on: nothing changes for short ones.

    It is for reading long texts without training on them. What a text gets depends on the longest beside it, so examples longer
    than the original context are refused in training.

    Source: dynamic NTK-aware scaling, as in Peng et al. 2023, arXiv:2309.00071, section 3.3.
    """

    kind: Literal["dynamic"] = "dynamic"

    lengthens: ClassVar[bool] = False


class RopeYarn(RopeScaling):
    """Low frequencies are divided by the factor, high ones kept, attention sharpened: the least training for long contexts.

    Source: Peng et al. 2023 (YaRN), arXiv:2309.00071, definitions 2 and 3; 400 steps took a 7B base to 16 times its context.
    """

    kind: Literal["yarn"] = "yarn"
    beta_fast: float = Field(default=32.0, gt=0)
    """Frequencies that turn more often than this in the original context are kept; a larger value keeps fewer."""
    beta_slow: float = Field(default=1.0, gt=0)
    """Frequencies that turn less often than this are divided by the factor; a larger value divides more."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"`beta_slow` is {self.beta_slow:g} and `beta_fast` {self.beta_fast:g}: it must be smaller")
        return self

    def _fields(self, original: int) -> dict[str, Any]:
        return {**super()._fields(original), "original_max_position_embeddings": original}


class RopeLlama3(RopeScaling):
    """Low frequencies are divided by the factor, high ones kept, as Llama 3.1 was: for bases of that family.

    Source: Grattafiori et al. 2024 (Llama 3), arXiv:2407.21783, section 3.4.2, and the parameters of its release.
    """

    kind: Literal["llama3"] = "llama3"
    low_freq_factor: float = Field(default=1.0, gt=0)
    """Waves longer than the original context over this are divided; a larger value divides more."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """Waves shorter than the original context over this are kept; a larger value keeps fewer."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.low_freq_factor >= self.high_freq_factor:
            what = f"`low_freq_factor` is {self.low_freq_factor:g} and `high_freq_factor` {self.high_freq_factor:g}"
            raise ValueError(f"{what}: it must be smaller")
        return self

    def _fields(self, original: int) -> dict[str, Any]:
        return {**super()._fields(original), "original_max_position_embeddings": original}


Rope = Annotated[RopeDynamic | RopeLinear | RopeLlama3 | RopeYarn, Field(discriminator="kind")]


def _unfit(field: str, what: str, hint: str | None) -> RequestError:
    return RequestError("the positions of the model cannot be scaled so", [Problem(f"model.rope.{field}", what, hint)])
