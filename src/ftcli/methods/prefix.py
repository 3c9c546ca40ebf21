"""Prefix tuning: trained keys and values before every example, in every layer. Source: Li and Liang 2021, arXiv:2101.00190."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from ftcli.errors import Problem, RequestError
from ftcli.methods.soft_prompt import SoftPrompt, common_token_ids, repeated, text_ids

if TYPE_CHECKING:
    from peft import PrefixTuningConfig, PromptLearningConfig
    from torch import Tensor
    from transformers import PreTrainedModel

    from ftcli.methods.context import AttachContext

NETWORK_LR_RATIO = 0.04
PrefixInit = Literal["data", "text", "sampled-vocabulary", "random"]


class Prefix(SoftPrompt):
    """Trained keys and values before every example, in every layer: the strongest of the soft prompts.

    It trains 2 * layers times as many numbers a virtual token as kind `prompt`, costs every query so many keys more, and cannot be
    merged. Take it where the base must stay as it is and one server holds many tasks; kind `lora` where a merge is wanted. It takes
    positions as a text before the example would. The model must keep equal keys and values in every layer.

    Defaults: 150 steps of 8 on the embedded orders (base 6.83 nats) end at 0.16 with the scaled rate of 0.11 (0.38 with half of it,
    1.87 with a tenth, 0.44 with four times); init `random` ends at 0.20, `sampled-vocabulary` at 0.40, `reparametrise: 128` at 0.37.
    At width 3072 the rate is 6.7e-3; in PEFT's comparison 5e-3 beat 1e-3, 0.416 to 0.186, both with a start from real text.

    On the embedded model it does not beat the untuned base in orders that are exact after 100 steps (0 %, loss 6.8 to 0.5); with 20
    labels it does, 0 to 8 % (docs/methods.md, three seeds).
    """

    kind: Literal["prefix"] = "prefix"
    prefix_length: int = Field(default=20, ge=1)
    """Virtual tokens; a larger value can hold more, is slower, and leaves less of the context for the example."""
    init: PrefixInit | None = None
    """What keys and values start as: the base's own on training examples (`data`, the default), on `init_text`, on common tokens,
    or random numbers (always so under `reparametrise`)."""
    init_text: str | None = Field(default=None, min_length=1)
    """For `init: text`: words that would help as a plain prompt; repeated or cut to `prefix_length` tokens."""
    reparametrise: int | None = Field(default=None, ge=1)
    """Hidden size of a network that computes the prefix while it trains, and is not saved; a larger value learns more parameters."""
    ensemble: int = Field(default=1, ge=1)
    """Prefixes with different starts, all trained on every example (the loss is the mean of theirs), which vote on answers."""

    default_lr: ClassVar[float] = 5e-3

    def lr_at(self, width: int) -> float:
        """The default peak learning rate; the matrices of a network take a smaller one than the prefix itself."""
        return super().lr_at(width) * (NETWORK_LR_RATIO if self.reparametrise is not None else 1.0)

    @property
    def num_virtual_tokens(self) -> int:
        return self.prefix_length

    @property
    def num_members(self) -> int:
        return self.ensemble

    @model_validator(mode="after")
    def _check_init(self) -> Self:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("`init: text` and `init_text` belong together: give both or neither")
        if self.reparametrise is not None and self.init not in (None, "random"):
            raise ValueError(
                f"`reparametrise` computes the prefix by a network, which cannot start as init `{self.init}`: use init `random`"
            )
        if self.ensemble > 1 and self.init in ("text", "data"):
            raise ValueError(f"the members of an ensemble would all start from the same {self.init}: use init `sampled-vocabulary`")
        return self

    def peft_config(self, model: PreTrainedModel) -> PrefixTuningConfig:
        from peft import PrefixTuningConfig

        num_layers, num_heads, head_size = cache_shape(model)
        return PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.prefix_length,
            token_dim=num_heads * head_size,
            num_transformer_submodules=1,
            num_attention_heads=num_heads,
            num_layers=num_layers,
            prefix_projection=self.reparametrise is not None,
            encoder_hidden_size=self.reparametrise or num_heads * head_size,
        )

    def saved_config(self, config: PromptLearningConfig) -> PromptLearningConfig:
        from dataclasses import replace

        return replace(cast("PrefixTuningConfig", config), prefix_projection=False)

    def start(self, model: PreTrainedModel, context: AttachContext, config: PromptLearningConfig) -> Tensor | None:
        """(V, layers * 2 * G * K) keys and values."""
        import torch

        if self.reparametrise is not None:
            return None
        num_rows = len(cast("Any", model.get_input_embeddings()).weight)
        ids = common_token_ids(context, num_rows, self.prefix_length)
        if self.init_text is not None:
            ids = text_ids(context, self.init_text, self.prefix_length)
        elif self.init == "data" or (self.init is None and self.ensemble == 1):
            ids = _example_ids(context, self.prefix_length)
        computed = base_key_values(model, ids)
        return torch.randn_like(computed) * computed.std(dim=0) if self.init == "random" else computed


def _example_ids(context: AttachContext, count: int) -> list[int]:
    """The first `count` tokens of the first training examples.

    Raises:
        RequestError: there is no training data.
    """
    if context.sample_batches is None:
        raise RequestError("there is nothing to start from", [Problem("method.init", "`data` without training data")])
    batch = context.sample_batches(1)[0]
    return repeated(batch["input_ids"][batch["attention_mask"].bool()].tolist(), count)


def base_key_values(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """(n, layers * 2 * G * K) float32 keys and values that the base itself computes on `ids`."""
    import torch

    from ftcli.layout.virtual import flat_key_values

    layers = _cache_layers(model, ids)
    with torch.no_grad():
        return flat_key_values([(layer.keys.float(), layer.values.float()) for layer in layers])


def cache_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Layers, key/value heads and numbers of a head, found by computing one token and not by a list of architectures.

    Raises:
        RequestError: the model keeps something else than equal keys and values in every layer.
    """
    layers = _cache_layers(model, [0])
    shapes = {tuple(part.shape) for layer in layers for part in (layer.keys, layer.values)}
    if len(shapes) != 1:
        found = ", ".join(sorted(str(shape) for shape in shapes))
        raise _no_place(model, f"its layers keep keys and values of different shapes ({found}), and PEFT's layout knows one")
    _, num_heads, _, head_size = shapes.pop()
    return len(layers), num_heads, head_size


def _cache_layers(model: PreTrainedModel, ids: list[int]) -> list[Any]:
    """The layers of the cache after `ids`, without a window: each has keys and values (1, G, n, K)."""
    import torch
    from transformers import DynamicCache

    tokens = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        output = model(input_ids=tokens, past_key_values=DynamicCache(), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", None)
    if not layers or any(getattr(layer, "keys", None) is None or len(layer.keys.shape) != 4 for layer in layers):
        raise _no_place(model, "it does not keep keys and values of every layer (state spaces, linear attention, convolutions)")
    num_layers = model.config.get_text_config().num_hidden_layers
    if len(layers) != num_layers:
        raise _no_place(model, f"{len(layers)} of its {num_layers} layers keep keys and values of their own")
    return list(layers)


def _no_place(model: PreTrainedModel, why: str) -> RequestError:
    what = f"`{model.config.model_type}` has no place for a prefix: {why}"
    return RequestError("the method does not fit the model", [Problem("method.kind", what, "kind `prompt`, or `lora`")])
