"""LoRA: low-rank matrices beside the frozen weights of the base. Source: Hu et al. 2021, arXiv:2106.09685."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from ftcli.methods.low_rank import LowRank


class Lora(LowRank):
    """Low-rank matrices beside the frozen weights of the base."""

    kind: Literal["lora"] = "lora"

    @model_validator(mode="after")
    def _check_init(self) -> Self:
        if self.init == "loftq":
            raise ValueError("init `loftq` makes up for the error of quantisation, and kind `lora` does not quantise: use kind `qlora`")
        return self
