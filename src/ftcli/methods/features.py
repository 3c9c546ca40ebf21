"""Features: the base computes one vector for each text, once, and a small classifier learns from these vectors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from ftcli.errors import Problem, RequestError
from ftcli.methods.method import MethodSettings

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ftcli.methods.context import AttachContext
    from ftcli.methods.feature_head import FeatureHead, FeatureSet

WEIGHTS_FILE, CONFIG_FILE = "feature_head.safetensors", "adapter_config.json"
FORMAT = "ftcli-features"


class Features(MethodSettings):
    """A classifier over what the frozen base makes of a text, computed once and kept on disk beside the tokenised data.

    The cheapest way to a classifier: one forward pass over the data, whatever the number of epochs. To be used for a first figure
    in seconds, for many classifiers over one base, and where the base must not change; where the base does not separate the
    labels, methods that move it are better.

    With `solver: steps` the steps of the run are ordinary updates of the classifier, over kept features instead of forward passes.
    The other solvers fit the whole classifier at the end of the first step; what steps are left measure it and leave it as it is.
    Features are standardised by the mean and deviation over the training data. The default learning rate is that of `head`.
    """

    kind: Literal["features"] = "features"
    classifier: Literal["linear", "svm", "mlp"] = "linear"
    """`linear` is logistic regression (of a regression: ridge), `svm` a linear support vector machine with squared hinge loss, `mlp`
    has one hidden layer."""
    solver: Literal["torch", "sklearn", "steps"] = "torch"
    """Who fits: L-BFGS of torch over all the data, scikit-learn (an extra; single labels only), or the run's own optimizer."""
    strength: float = Field(default=1.0, gt=0)
    """What the data counts against the size of the weights, as scikit-learn's C; a larger value fits closer. Not read by `steps`,
    where `train.optimizer.weight_decay` does it."""
    hidden: int | None = Field(default=None, ge=1)
    """Width of the hidden layer of `mlp`; the default is 128."""

    default_lr: ClassVar[float] = 1e-3
    artefact: ClassVar[Literal["model", "adapter"]] = "adapter"
    reads_features: ClassVar[bool] = True

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        """Options of one choice beside another would be ignored."""
        if self.classifier == "svm" and self.solver == "steps":
            raise ValueError("found `solver: steps` with `classifier: svm`, allowed: `torch`, `sklearn`")
        if self.classifier != "mlp" and self.hidden is not None:
            raise ValueError(f"found `hidden` with `classifier: {self.classifier}`, allowed: with `classifier: mlp`")
        return self

    def attach(self, model: PreTrainedModel, context: AttachContext) -> nn.Module:
        """`model`, frozen, with the classifier as its head.

        Raises:
            RequestError: the model has no classification head, or scikit-learn is not installed.
        """
        import torch

        from ftcli.methods.feature_head import FeatureHead, require_sklearn
        from ftcli.models.classifier import is_classifier

        if not is_classifier(model):
            what = "`features` trains a classifier, and the objective has no classification head"
            hint = "objective: {kind: classification, readout: head}"
            raise RequestError("the method does not fit the objective", [Problem("method.kind", what, hint)])
        if self.solver == "sklearn":
            require_sklearn()
        model.requires_grad_(False)
        config: Any = model.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            width = int(config.get_text_config().hidden_size)
            head = FeatureHead(width, int(config.num_labels), (self.hidden or 128) if self.classifier == "mlp" else None)
        model.add_module("score", head.to(model.device))
        return model

    def learn_from(self, module: nn.Module, features: FeatureSet) -> None:
        """Give the classifier the features of all training data; the loop's batches hold the same, a few at a time.

        Raises:
            RequestError: the solver does not know the task.
        """
        if (self.solver == "sklearn" and features.task != "single") or (self.classifier == "svm" and features.task == "regression"):
            what = f"`{self.classifier}` by `{self.solver}` cannot learn `task: {features.task}`"
            raise RequestError(
                "the method does not fit the objective", [Problem("method.solver", what, "solver: torch, classifier: linear")]
            )
        head = feature_head(module)
        head.standardise(features.vectors)
        head.training_set = features

    def before_step(self, module: nn.Module, step: int, num_steps: int, seed: int) -> None:
        """Remember what was fitted: every update after the fit is taken back."""
        head = feature_head(module)
        head.kept = [parameter.detach().clone() for parameter in head.parameters()] if self.solver != "steps" and step > 1 else None

    def after_update(self, module: nn.Module, step: int, num_steps: int) -> None:
        """Fit, at the end of the first step."""
        if self.solver == "steps":
            return
        from ftcli.methods.feature_head import fit

        head = feature_head(module)
        if head.kept is None:
            fit(head, self.classifier, self.solver, self.strength)
            return
        for parameter, kept in zip(head.parameters(), head.kept, strict=True):
            parameter.data.copy_(kept)

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """Mean and deviation of the features."""
        return {name: buffer.detach() for name, buffer in feature_head(module).named_buffers()}

    def restore(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for name, buffer in feature_head(module).named_buffers():
            buffer.copy_(state[name])

    def save(self, module: nn.Module, folder: Path) -> None:
        """Write the classifier as safetensors and what it is as JSON; there is no pickle in it."""
        from safetensors.torch import save_file

        from ftcli.layout.model import inner_model

        head = feature_head(module)
        config: Any = inner_model(module).config
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}, folder / WEIGHTS_FILE)
        what = {
            "format": FORMAT,
            "base_model_name_or_path": config._name_or_path,
            "classifier": self.classifier,
            "hidden": head.num_hidden,
            "labels": [config.id2label[index] for index in range(config.num_labels)],
            "problem_type": config.problem_type,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(what, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def load(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        """The saved classifier on a fresh `base`.

        Raises:
            RequestError: the folder holds none, or one of other features.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from ftcli.methods.context import AttachContext

        module = self.attach(base, AttachContext(seed=0))
        try:
            feature_head(module).load_state_dict(load_file(folder / WEIGHTS_FILE))
        except (OSError, SafetensorError, RuntimeError) as error:
            first_line = (str(error).splitlines() or [""])[0]
            raise RequestError("the classifier cannot be loaded", [Problem(str(folder / WEIGHTS_FILE), first_line)]) from error
        return module.requires_grad_(False).eval()

    @property
    def merges(self) -> bool:
        """The head of the architecture has no place for what is trained."""
        return False

    def merge(self, module: nn.Module) -> PreTrainedModel:
        """
        Raises:
            RequestError: always.
        """
        what = "a classifier over standardised features has a bias or a hidden layer, for which the head of the architecture has no place"
        raise RequestError(
            "there is nothing to merge",
            [Problem("method.kind", what, "`ftcli predict` uses it as it is; kind: head trains the model's own")],
        )


def feature_head(module: nn.Module) -> FeatureHead:
    """The classifier on a module that `attach` made."""
    from ftcli.layout.model import inner_model

    return cast("FeatureHead", cast("Any", inner_model(module)).score)
