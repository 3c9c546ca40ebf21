"""Linear weights in 4 bits, in blocks of 64 with a common scale (bitsandbytes), as a folder for transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ftcli.exporting import weight_only
from ftcli.exporting.checks import Check
from ftcli.exporting.formats.format import Format, Subject
from ftcli.models.quantisation import Quantization

if TYPE_CHECKING:
    from ftcli.exporting.source import Source

BITS = 4.2  # a weight, with its share of the scales


class Int4(Format):
    """An eighth of float32; `nf4` has its levels where normal numbers are dense, `fp4` is a floating-point number."""

    kind: ClassVar[str] = "int4"
    dtypes: ClassVar[tuple[str, ...]] = ("nf4", "fp4")

    @property
    def _quantization(self) -> Quantization:
        return Quantization(format="fp4" if self.dtype == "fp4" else "nf4")

    def num_bytes(self, num_parameters: int, source: Source) -> int:
        return weight_only.num_bytes(num_parameters, source, BITS)

    def write(self, subject: Subject, folder: Path) -> None:
        weight_only.write_quantised(subject, folder, self._quantization)

    def verify(self, subject: Subject, folder: Path) -> Sequence[Check]:
        return weight_only.verify_quantised(subject, folder, self._quantization)

    def stored_dtype(self, source: Source) -> str:
        return "nf4" if self.dtype == "auto" else self.dtype

    def usage(self, name: str, source: Source) -> str:
        return weight_only.usage()

    def next_commands(self, output: Path) -> Sequence[str]:
        return weight_only.next_commands(output)
