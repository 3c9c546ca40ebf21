"""Tensors as safetensors stores them, and as float32 arrays: read exactly, rounded once, to the nearest with ties to even.

bfloat16, which NumPy has not, is the upper half of a float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

STORED: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
"""The element type that the bytes of a safetensors dtype are read as; what is not here is copied, never computed with."""

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""torch's names of the dtypes that can be written."""

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
"""Bytes of one element."""

LARGEST = {"F32": float(np.finfo(np.float32).max), "F16": 65504.0, "BF16": 3.3895313892515355e38}
"""The largest finite value; what is beyond it would be written as infinity."""


def to_float32(stored: NDArray[Any], dtype: str) -> Array:
    """The numbers that `stored` means, exactly (float64 is rounded).

    Args:
        stored: any shape, of the element type `STORED[dtype]`.
        dtype: safetensors' name.
    """
    if dtype == "BF16":
        bits = stored.astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)
    return stored.astype(np.float32)


def from_float32(values: Array, dtype: str) -> NDArray[Any]:
    """`values` rounded to the nearest number of `dtype`, ties to even, as they are stored.

    Args:
        values: any shape, finite.
        dtype: safetensors' name.
    """
    if dtype != "BF16":
        return values.astype(STORED[dtype])
    bits = np.ascontiguousarray(values).view(np.uint32)
    # half a step, but for an even neighbour below one less
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    return rounded.astype(np.uint16).reshape(values.shape)


_EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00}
"""The bits that are all set in what is NaN or infinite."""


def are_finite(stored: NDArray[Any], dtype: str) -> bool:
    """True when no number is NaN or infinite; whole numbers and booleans never are.

    Args:
        stored: any shape, as it is stored: of the element type `STORED[dtype]`, or bytes of dtypes without one.
        dtype: safetensors' name.
    """
    if dtype in _EXPONENTS:
        bits = stored.view(np.uint16) & np.uint16(_EXPONENTS[dtype])
        return not bool((bits == _EXPONENTS[dtype]).any())
    if dtype in ("F32", "F64"):
        return bool(np.isfinite(stored).all())
    if dtype in ("F8_E4M3", "F8_E5M2"):
        # E4M3 has no infinity, and one NaN of each sign
        return not bool(((stored.view(np.uint8) & 0x7F) >= (0x7F if dtype == "F8_E4M3" else 0x7C)).any())
    return True


def fits(values: Array, dtype: str) -> bool:
    """True when every value is finite, and stays so in `dtype`."""
    if values.size == 0:
        return True
    # NaN makes both comparisons false
    return bool(values.max() <= LARGEST[dtype] and values.min() >= -LARGEST[dtype])
