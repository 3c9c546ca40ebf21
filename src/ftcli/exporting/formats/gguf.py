"""One GGUF file for llama.cpp and what is built on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ftcli.errors import UsageError
from ftcli.exporting.checks import Check
from ftcli.exporting.formats.format import Format, Subject
from ftcli.exporting.gguf.file import K_QUANTS, TYPES, require_gguf, write_gguf

if TYPE_CHECKING:
    from ftcli.exporting.source import Source


class Gguf(Format):
    """Merged weights, tokenizer and template in one file."""

    kind: ClassVar[str] = "gguf"
    dtypes: ClassVar[tuple[str, ...]] = tuple(TYPES)

    def __post_init__(self) -> None:
        if self.dtype in K_QUANTS:
            hint = f"write f16, then: llama-quantize MODEL-f16.gguf OUT.gguf {self.dtype.upper()}; or one of {', '.join(TYPES)}"
            raise UsageError(f"--dtype {self.dtype}: the `gguf` package can read k-quants and not write them; llama.cpp can", hint=hint)
        super().__post_init__()

    def check(self, source: Source) -> None:
        require_gguf()
        source_family(source)

    def num_bytes(self, num_parameters: int, source: Source) -> int:
        return int(num_parameters * TYPES[self.stored_dtype(source)] / 8) + 2**22

    def write(self, subject: Subject, folder: Path) -> None:
        write_gguf(
            subject.model,
            subject.source.tokenizer,
            folder / self.file_name(subject.source),
            self.stored_dtype(subject.source),
            subject.source.name,
        )

    def verify(self, subject: Subject, folder: Path) -> Sequence[Check]:
        from ftcli.exporting.gguf.read_back import by_llama_cpp, by_transformers

        path, kind = folder / self.file_name(subject.source), self.stored_dtype(subject.source)
        return [by_transformers(subject, path, kind), by_llama_cpp(subject, path, kind)]

    def stored_dtype(self, source: Source) -> str:
        return {"bfloat16": "bf16", "float16": "f16"}.get(source.dtype, "f16") if self.dtype == "auto" else self.dtype

    def file_name(self, source: Source) -> str:
        """Of the one file."""
        return f"{source.name}-{self.stored_dtype(source)}.gguf"

    def usage(self, name: str) -> str:
        return "```sh\nllama-cli -m *.gguf -cnv\n```"

    def next_commands(self, output: Path) -> Sequence[str]:
        return [f"llama-cli -m {output}/*.gguf -cnv", f"llama-server -m {output}/*.gguf"]


def source_family(source: Source) -> None:
    """Refuse a source that GGUF cannot hold, from its configuration and tokenizer alone.

    Raises:
        RequestError: why not.
    """
    from ftcli.exporting.gguf.families import family_of
    from ftcli.exporting.gguf.vocabulary import vocabulary_of

    family_of(source.config())
    vocabulary_of(source.tokenizer, source.tokenizer.vocab_size)
