"""What was found when an export was loaded back by the tool that is to use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftcli.exporting.difference import Difference


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison of an export with its source."""

    name: str
    """What was loaded by what."""
    passed: bool | None
    """None where it could not be tried: the runtime is missing."""
    detail: str = ""
    difference: Difference | None = None
    """From the source, on the probe."""

    def line(self) -> str:
        """One line for people."""
        is_nan = self.difference is not None and not self.difference.is_number
        words = {True: "passed", False: "FAILED", None: "not verified"}[False if is_nan else self.passed]
        parts = [part for part in (self.difference.line() if self.difference is not None else "", self.detail) if part]
        return f"{words}: {self.name}" + (f" ({'; '.join(parts)})" if parts else "")

    def to_json(self) -> dict[str, Any]:
        """The check as it stands in reports and manifests."""
        found = self.difference
        difference = None if found is None else {"kl": found.kl, "argmax_agreement": found.argmax_agreement, "num_tokens": found.num_tokens}
        return {"name": self.name, "passed": self.passed, "detail": self.detail, "difference": difference}
