"""Causal language modelling: predict each target from what stands before it in its branch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ftcli.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ftcli.data.tree import TokenTree
    from ftcli.layout.batch import Batch


class CausalLM(Spec):
    """Next-token cross-entropy over the targets: supervised fine-tuning and continual pre-training alike."""

    kind: Literal["causal-lm"] = "causal-lm"
    prompt_loss_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight of a prompt token as a target, in 0..1; at 0 only the answers are learnt, at 1 prompts count like answers."""

    def target_weights(self, tree: TokenTree) -> NDArray[np.float32]:
        """(n,) weight of each token of `tree` as a target; tokens of weight 0 never reach the output head."""
        from ftcli.data.tree import target_weights

        return target_weights(tree, self.prompt_loss_weight)

    def loss_sum(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """Weighted sum of the targets' negative log-probabilities, in nats.

        Args:
            log_probs: ``(M,)`` float32, log-probability of each target of the batch.
        """
        return -(log_probs * batch.weights).sum()
