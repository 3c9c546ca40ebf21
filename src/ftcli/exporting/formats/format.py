"""What every export format answers: what it needs, how large it gets, how it is written, and how it is loaded back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ftcli.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ftcli.exporting.checks import Check
    from ftcli.exporting.source import Source

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Subject:
    """What is exported, loaded."""

    source: Source
    module: nn.Module
    """Plain weights in float32, or, for a format that keeps the adapter apart, base and adapter."""
    expected: Tensor
    """``(tokens, vocabulary)`` logits of base and adapter on the source's probe."""

    @property
    def model(self) -> PreTrainedModel:
        """The plain model."""
        from ftcli.models.load import as_pretrained

        return as_pretrained(self.module)


@dataclass(frozen=True)
class Format(ABC):
    """A way to hand a model on; its settings are what the command line may say about it."""

    dtype: str = "auto"
    """How weights are stored: one of `dtypes`; `auto` is what the format prefers."""
    max_shard_bytes: int = SHARD_BYTES
    """Largest file of weights, for formats that have several."""
    data: Path | None = None
    """Rows of text by which weights are rounded, for formats that do; None for those a run was trained on."""

    kind: ClassVar[str]
    """The name after `--to`."""
    dtypes: ClassVar[tuple[str, ...]]
    """What `dtype` may be, besides `auto`; empty where there is no choice."""
    is_merged: ClassVar[bool] = True
    """The format needs plain weights."""
    single: ClassVar[bool] = True
    """The format holds one target."""
    reads_data: ClassVar[bool] = False
    """The format looks at `data`."""

    def __post_init__(self) -> None:
        if self.data is not None and not self.reads_data:
            raise UsageError(f"`{self.kind}` reads no data", hint="leave --data out, or `--to gptq`")
        if self.dtype != "auto" and self.dtype not in self.dtypes:
            allowed = ", ".join(("auto", *self.dtypes))
            hint = did_you_mean(self.dtype, self.dtypes)
            raise UsageError(f"--dtype {self.dtype} is not offered by `{self.kind}`", hint=f"{hint}; " * bool(hint) + f"allowed: {allowed}")

    def check(self, source: Source) -> None:  # noqa: B027 - most formats hold everything
        """Refuse what this format cannot hold, before any weight is read.

        Raises:
            RequestError: why not.
        """

    def check_together(self, sources: Sequence[Source]) -> None:  # noqa: B027 - most formats hold one source
        """Refuse sources that do not go together, for formats that hold several.

        Raises:
            RequestError: why not.
        """

    def check_portable(self, source: Source) -> None:  # noqa: B027 - most formats name nothing of this machine
        """Refuse what would be of no use on another machine, before any weight is read.

        Raises:
            RequestError: why not.
        """

    @abstractmethod
    def num_bytes(self, num_parameters: int, source: Source) -> int:
        """About how much disk the export takes while it is written."""

    def shared_bytes(self, num_parameters: int, source: Source) -> int:
        """What comes on top of that once, however many sources there are."""
        return 0

    @abstractmethod
    def write(self, subject: Subject, folder: Path) -> None:
        """Fill `folder`."""

    @abstractmethod
    def verify(self, subject: Subject, folder: Path) -> Sequence[Check]:
        """Load `folder` by what is to use it, and compare with the source."""

    def write_all(self, subjects: Sequence[Subject], folder: Path) -> None:
        """Fill `folder` with every subject."""
        for subject in subjects:
            self.write(subject, folder)

    def verify_all(self, subjects: Sequence[Subject], folder: Path) -> Sequence[Check]:
        """Load all of `folder` back."""
        return [check for subject in subjects for check in self.verify(subject, folder)]

    def stored_dtype(self, source: Source) -> str:
        """The dtype in words."""
        return source.dtype if self.dtype == "auto" else self.dtype

    @abstractmethod
    def usage(self, name: str, source: Source) -> str:
        """Markdown: how the folder `name` of an export of `source` is used, for the model card."""

    @abstractmethod
    def next_commands(self, output: Path) -> Sequence[str]:
        """What one would type next."""
