"""Causal language modelling: predict each target from what stands before it in its branch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ftcli.objectives.objective import Losses, ObjectiveSettings, Posed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ftcli.data.tree import TokenTree
    from ftcli.layout.batch import Batch


class CausalLM(ObjectiveSettings):
    """Next-token cross-entropy over the targets: supervised fine-tuning and continual pre-training alike."""

    kind: Literal["causal-lm"] = "causal-lm"
    prompt_loss_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight of a prompt token as a target, in 0..1; at 0 only the answers are learnt, at 1 prompts count like answers."""

    formats: ClassVar[frozenset[str]] = frozenset({"chat", "completion", "instruction", "text"})
    regularizers: ClassVar[frozenset[str]] = frozenset({"ewc", "kl", "l2_sp"})

    def target_weights(self, tree: TokenTree) -> NDArray[np.float32]:
        """(n,) weight of each token of `tree` as a target; tokens of weight 0 never reach the output head."""
        from ftcli.data.tree import target_weights

        return target_weights(tree, self.prompt_loss_weight)

    def pose(self, tree: TokenTree, *, is_measured: bool = False) -> Posed:
        """The example as it is; prompts are never measured."""
        import numpy as np

        from ftcli.data.tree import target_weights

        weights = target_weights(tree, 0.0) if is_measured else self.target_weights(tree)
        return Posed(tree, weights, weight=float(np.sum(weights, dtype=np.float64)), num_targets=int(np.count_nonzero(weights)))

    def losses(self, outputs: Tensor, batch: Batch) -> Losses:
        """Each target's negative log-probability, in nats."""
        return Losses(-outputs, batch.weights, batch.example)
