"""Prompt tuning: trained embeddings before every example. Source: Lester et al. 2021, arXiv:2104.08691."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from ftcli.errors import Problem, RequestError
from ftcli.methods.soft_prompt import SoftPrompt, common_token_ids, hidden_size, text_ids

if TYPE_CHECKING:
    from peft import PromptLearningConfig, PromptTuningConfig
    from torch import Tensor
    from transformers import PreTrainedModel

    from ftcli.methods.context import AttachContext

PromptInit = Literal["sampled-vocabulary", "text", "labels", "random"]


class Prompt(SoftPrompt):
    """Trained embeddings before every example: the smallest of all adapters, `prompt_length` times the hidden size.

    It costs the prompt's tokens once a batch in training and once an answer, and cannot be merged. Take it for large bases and
    for many tasks on one server; on small bases it is far behind kinds `prefix` and `lora`, which is what the paper found, too.

    Defaults: 150 steps of 8 on the embedded orders (base 6.88 nats) end at 1.78 with rates of 0.03 and 0.1 and at 2.15 with 0.2;
    init `random` ends at 1.66, `text` at 1.67, so that here they hardly differ, while in PEFT's comparison the sampled vocabulary
    took 0.343 against 0.057 for its own random start, whose numbers are far larger than embeddings are. The rate of 0.085 at width
    192 is 5.3e-3 at 3072, about what did best there.

    On bases of a few million parameters it does not beat the untuned base: no order exact and at most 1 % of 20 labels right after
    100 to 240 steps, though the loss falls (6.7 to 2.1 nats on orders; docs/methods.md, three seeds).
    """

    kind: Literal["prompt"] = "prompt"
    prompt_length: int = Field(default=20, ge=1)
    """Virtual tokens; a larger value can hold more, is slower, and leaves less of the context for the example."""
    init: PromptInit = "sampled-vocabulary"
    """What the virtual tokens start as: embeddings of common tokens, of `init_text`, of class labels, or random ones of like size."""
    init_text: str | None = Field(default=None, min_length=1)
    """For `init: text`: words that would help as a plain prompt; repeated or cut to `prompt_length` tokens."""
    init_labels: tuple[str, ...] = ()
    """For `init: labels`: the words of the classes; left out, they are the most frequent answers of the training data."""
    ensemble: int = Field(default=1, ge=1)
    """Prompts with different starts, all trained on every example (the loss is the mean of theirs), which vote on answers."""

    default_lr: ClassVar[float] = 4e-3

    @property
    def num_virtual_tokens(self) -> int:
        return self.prompt_length

    @property
    def num_members(self) -> int:
        return self.ensemble

    @model_validator(mode="after")
    def _check_init(self) -> Self:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("`init: text` and `init_text` belong together: give both or neither")
        if self.init_labels and self.init != "labels":
            raise ValueError("`init_labels` is read with `init: labels` only")
        if self.ensemble > 1 and self.init == "text":
            raise ValueError("the members of an ensemble would all start from the same text: use init `sampled-vocabulary` or `random`")
        return self

    def peft_config(self, model: PreTrainedModel) -> PromptTuningConfig:
        return embedding_config(model, self.prompt_length)

    def saved_config(self, config: PromptLearningConfig) -> PromptLearningConfig:
        return config

    def start(self, model: PreTrainedModel, context: AttachContext, config: PromptLearningConfig) -> Tensor:
        """(V, D) embeddings."""
        import torch

        table = cast("Tensor", model.get_input_embeddings().weight).detach()
        if self.init == "random":
            return torch.randn(self.prompt_length, table.shape[1]).to(table.device) * table.float().std()
        if self.init_text is not None:
            return embedded(model, text_ids(context, self.init_text, self.prompt_length))
        common = embedded(model, common_token_ids(context, len(table), self.prompt_length))
        if self.init == "labels":
            labels = self._labels(model, context)
            # In another order for every member of an ensemble.
            chosen = labels[torch.randperm(len(labels))] if self.ensemble > 1 else labels
            common[: len(chosen)] = chosen[: self.prompt_length]
        return common

    def _labels(self, model: PreTrainedModel, context: AttachContext) -> Tensor:
        """(n, D): for each class the mean of its tokens' embeddings.

        Raises:
            RequestError: there is no label.
        """
        import torch

        if self.init_labels:
            tokens = [context.tokenizer.encode(label)[0] if context.tokenizer is not None else [] for label in self.init_labels]
        else:
            tokens = context.answers(self.prompt_length) if context.answers is not None else []
        if not tokens or not all(tokens):
            what = "`labels` without answers in the data" if not self.init_labels else "a label without tokens"
            raise RequestError("there is nothing to start from", [Problem("method.init", what, "use init: sampled-vocabulary")])
        return torch.stack([embedded(model, ids).mean(dim=0) for ids in tokens])


def embedded(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """(n, D) float32 input embeddings, as the model itself computes them."""
    import torch

    table = model.get_input_embeddings()
    with torch.no_grad():
        return cast("Tensor", table(torch.tensor(ids, device=model.device))).float()


def embedding_config(model: PreTrainedModel, length: int) -> PromptTuningConfig:
    """PEFT's configuration for `length` virtual embeddings."""
    from peft import PromptTuningConfig

    config = model.config.get_text_config()
    return PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=length,
        token_dim=hidden_size(model),
        num_transformer_submodules=1,
        num_attention_heads=getattr(config, "num_attention_heads", None) or 1,
        num_layers=getattr(config, "num_hidden_layers", None) or 1,
    )
