"""A base model with a classification head of transformers, in place of the head of a language model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftcli.errors import Problem, RequestError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

Pooling = Literal["last", "first", "mean"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

POOLING_FIELD = "ftcli_pooling"
"""Where a configuration says that the head reads something else than transformers' own forward pass gives it."""


@dataclass(frozen=True, slots=True)
class ClassHead:
    """What a classification head answers with."""

    labels: tuple[str, ...]
    """Names of the classes; the one name of the number for a regression."""
    problem_type: ProblemType
    pooling: Pooling | None = None
    """What of a text the head reads; None is what the architecture does: the last token of a decoder, the first of an encoder."""


def configure(config: PretrainedConfig, head: ClassHead, pad_id: int | None) -> None:
    """Let `config` describe a model with this head, as every tool reads it.

    Args:
        pad_id: of the tokenizer; transformers needs one to find the last token of a padded row.

    Raises:
        RequestError: the architecture cannot pool so.
    """
    config.num_labels = len(head.labels)
    config.id2label = dict(enumerate(head.labels))
    config.label2id = {label: index for index, label in enumerate(head.labels)}
    config.problem_type = head.problem_type
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_id
    if head.pooling is None:
        return
    if hasattr(config, "classifier_pooling"):  # ModernBERT
        if head.pooling == "last":
            raise _cannot_pool(config, head.pooling)
        config.classifier_pooling = {"first": "cls", "mean": "mean"}[head.pooling]
    else:
        setattr(config, POOLING_FIELD, head.pooling)


def settle_pooling(model: PreTrainedModel) -> None:
    """Take the pooling out of the configuration where it is what the architecture does anyway.

    Raises:
        RequestError: the head reads the first token and was asked for the last, or the other way round.
    """
    pooling = getattr(model.config, POOLING_FIELD, None)
    if pooling is None or pooling == "mean":
        return
    if pooling != ("last" if has_token_head(model) else "first"):
        raise _cannot_pool(model.config, pooling)
    delattr(model.config, POOLING_FIELD)


def _cannot_pool(config: PretrainedConfig, pooling: str) -> RequestError:
    what = f"the classification head of `{config.model_type}` cannot read the `{pooling}` token"
    return RequestError("the objective does not fit the model", [Problem("objective.pooling", what, "leave it out, or `mean`")])


def is_classifier(model: nn.Module) -> bool:
    """Does the model answer with logits of classes?"""
    return type(model).__name__.endswith("ForSequenceClassification")


def folder_head(folder: Path) -> Literal["own"] | None:
    """`own` where a model folder holds a classifier, None where it holds a language model."""
    try:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError):
        return None  # whoever loads the folder says what is wrong with it
    return "own" if any(str(name).endswith("ForSequenceClassification") for name in architectures) else None


def has_token_head(model: nn.Module) -> bool:
    """Is the head one linear layer over a token's state, which decoders call `score`? Other heads are run by the model itself."""
    return hasattr(model, "score")


def is_encoder(model: nn.Module) -> bool:
    """Is it a classifier that sees a text in both directions, with a head that transformers calls `classifier`?"""
    return is_classifier(model) and hasattr(model, "classifier")


def head_names(model: PreTrainedModel) -> list[str]:
    """Names of the modules of the classification head: what stands beside the base, and what its checkpoint did not have.

    They train under every method; a language model has none.
    """
    if not is_classifier(model):
        return []
    beside = [name for name, child in model.named_children() if name != model.base_model_prefix and any(True for _ in child.parameters())]
    return [*beside, *getattr(model, "fresh_modules", ())]


def task_type(model: PreTrainedModel) -> str:
    """What PEFT calls the kind of model."""
    return "SEQ_CLS" if is_classifier(model) else "CAUSAL_LM"


def is_head_tensor(name: str, model_class: Any) -> bool:
    """May a tensor of this name be missing in the checkpoint of a base, or be left over: is it of a head, and not of the base?"""
    return not name.startswith(f"{model_class.base_model_prefix}.") or ".pooler." in name


def fresh_modules(missing: list[str], model: PreTrainedModel) -> tuple[str, ...]:
    """Names of modules inside the base that the checkpoint did not have: the pooler of an encoder that was pre-trained without."""
    inside = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
    return tuple(sorted({name.partition(".pooler.")[0] + ".pooler" for name in inside}))
