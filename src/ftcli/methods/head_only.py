"""Head only: the base stays as it is, and what stands on it learns to read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from ftcli.methods.subset import Subset

if TYPE_CHECKING:
    from collections.abc import Collection

    from transformers import PreTrainedModel


class HeadOnly(Subset):
    """Only the head trains: the classification head, or the output head of a language model that has one of its own.

    A linear probe, and what the textbooks call fine-tuning I. No gradient goes into the base, so that a step costs a forward
    pass; `features` computes that pass once for all epochs. To be used where the base must stay as it is, or as a first answer to
    how much of a task the base already knows; it learns less than any method that moves the base.

    The default learning rate is given at the usual width of 4096; at the embedded model's 192 it comes to 2e-2, the best of 1e-3, 3e-3,
    7e-3, 2e-2 and 5e-2 by accuracy on snips (350 rows, three epochs: 0.38, 0.47, 0.55, 0.57, 0.57).
    """

    kind: Literal["head"] = "head"

    default_lr: ClassVar[float] = 1e-3

    def trained_names(self, model: PreTrainedModel) -> Collection[str]:
        """Names of the head's parameters.

        Raises:
            RequestError: the head is tied to the embedding, which would train with it, or there is none.
        """
        from ftcli.errors import Problem, RequestError
        from ftcli.methods.targets import head_name, is_tied
        from ftcli.models.classifier import head_names, is_classifier

        name = head_name(model)
        if not is_classifier(model) and (name is None or is_tied(model)):
            what = (
                "the model has no output head"
                if name is None
                else f"the output head `{name}` is tied to the embedding, which would train with it"
            )
            hint = "objective: {kind: classification, readout: head} has a head of its own; kind: full or lora trains language models"
            raise RequestError("the method does not fit the model", [Problem("method.kind", what, hint)])
        parts = head_names(model) if is_classifier(model) else [str(name)]
        return [parameter for parameter, _ in model.named_parameters() if any(parameter.startswith(f"{part}.") for part in parts)]
