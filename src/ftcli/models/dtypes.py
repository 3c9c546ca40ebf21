"""Names of the numeric types of weights, as recipes say them."""

from __future__ import annotations

from typing import Literal

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
