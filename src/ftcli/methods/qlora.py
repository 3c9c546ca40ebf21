"""QLoRA: LoRA on a base whose linear weights are quantised. Source: Dettmers et al. 2023, arXiv:2305.14314."""

from __future__ import annotations

from typing import Literal

from ftcli.methods.low_rank import LowRank
from ftcli.models.quantisation import Quantization


class Qlora(LowRank):
    """Low-rank matrices beside the frozen, quantised weights of the base."""

    kind: Literal["qlora"] = "qlora"
    quantize: Quantization = Quantization()
    """How the linear weights of the base are stored; the output head is not quantised."""

    def quantization(self) -> Quantization | None:
        """How the base is loaded."""
        return self.quantize
