"""The classification head trains under every method: its first weights are random."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftcli.errors import Problem, RequestError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def refuse_class_head(model: PreTrainedModel, kind: str) -> None:
    """Refuse a model with a classification head, for methods that cannot save one beside what they add.

    Raises:
        RequestError: the model has one.
    """
    from ftcli.models.classifier import is_classifier

    if is_classifier(model):
        what = f"`{kind}` does not train a classification head beside what it adds"
        hint = "objective.readout: label-words, or a method such as lora, ia3, peft, full, freeze, head"
        raise RequestError("the method does not fit the objective", [Problem("method.kind", what, hint)])


def let_head_train(module: nn.Module, kind: str) -> None:
    """Mark the classification head of `module` as trained; a language model has none.

    Args:
        module: what a method's `attach` gave.
        kind: of the method, for the error.

    Raises:
        RequestError: an adapter leaves the head out, so that it would be saved without it.
    """
    from ftcli.models.classifier import head_names

    get_base_model: Any = getattr(module, "get_base_model", None)
    model: Any = module if get_base_model is None else get_base_model()
    parts = [model.get_submodule(name) for name in head_names(model)]
    if get_base_model is None:
        for part in parts:
            part.requires_grad_(True)
        return
    from peft.utils import ModulesToSaveWrapper

    if not all(isinstance(part, ModulesToSaveWrapper) for part in parts):
        what = f"`{kind}` does not train the classification head beside its adapter"
        raise RequestError("the method does not fit the objective", [Problem("method.kind", what, "objective.readout: label-words")])
