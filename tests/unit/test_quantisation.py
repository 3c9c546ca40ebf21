"""4-bit weights read back: what a block of 64 holds, whatever the length of the rows."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from ftcli.models.quantisation import dequantised_weight, requantised_weight


@pytest.mark.parametrize("columns", [16, 64, 96, 160, 172])
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_weight_in_four_bits_is_near_itself_whatever_its_rows(columns: int, is_nested: bool) -> None:
    weight = torch.randn(64, columns, generator=torch.Generator().manual_seed(columns))
    layer = Linear4bit(columns, 64, bias=False, quant_type="nf4", compress_statistics=is_nested)
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu")
    read = dequantised_weight(layer)
    assert read.shape == weight.shape
    # 0.09 for normal numbers in blocks of 64; 0.17 and more with the scale of another block
    assert (read - weight).norm() / weight.norm() < 0.12
    torch.testing.assert_close(requantised_weight(layer, weight), read, rtol=0, atol=0)
