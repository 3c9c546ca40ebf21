"""Rows of a data set that comes with the package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from ftcli.data.sources.file import File
from ftcli.spec import ExpandedName, Spec


class Builtin(Spec):
    """Rows of a data set that comes with the package."""

    kind: Literal["builtin"] = "builtin"
    name: ExpandedName
    """Name of the data set; `ftcli doctor` lists them."""
    split: ExpandedName = "train"
    """`train` or `test`; the two do not overlap."""

    def label(self) -> str:
        return self.name if self.split == "train" else f"{self.name}-{self.split}"

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, row) of every row, in order."""
        for number, (_, row) in enumerate(self._file().rows(), start=1):
            yield f"builtin:{self.name}/{self.split}:{number}", row

    def fingerprint(self) -> str:
        """Hash of the data's bytes."""
        return self._file().fingerprint()

    def _file(self) -> File:
        from ftcli.builtin import catalogue

        return File(path=str(catalogue.dataset_path(self.name, self.split)))
