"""One GGUF file for llama.cpp and what is built on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ftcli.exporting.checks import Check
from ftcli.exporting.formats.format import Format, Subject
from ftcli.exporting.gguf.file import TYPES, further_stops, require_gguf, write_gguf
from ftcli.exporting.gguf.k_quants import K_QUANTS, check_rows, fallen_back, quantise, require_llama_cpp

if TYPE_CHECKING:
    from ftcli.exporting.source import Source


class Gguf(Format):
    """Merged weights, tokenizer and template in one file."""

    kind: ClassVar[str] = "gguf"
    dtypes: ClassVar[tuple[str, ...]] = (*TYPES, *K_QUANTS)

    def check(self, source: Source) -> None:
        require_gguf()
        if self.dtype in K_QUANTS:
            require_llama_cpp(self.dtype)
            check_rows(source.config(), self.dtype)
        source_family(source)

    def num_bytes(self, num_parameters: int, source: Source) -> int:
        kind = self.stored_dtype(source)
        bits = TYPES["f32"] + TYPES["q8_0"] if kind in K_QUANTS else TYPES[kind]  # the file it is made from, and the largest type in it
        return int(num_parameters * bits / 8) + 2**22

    def write(self, subject: Subject, folder: Path) -> None:
        source, kind = subject.source, self.stored_dtype(subject.source)
        path = folder / self.file_name(source)
        if kind not in K_QUANTS:
            write_gguf(subject.model, source.tokenizer, path, kind, source.name)
            return
        plain = path.with_suffix(".f32")
        write_gguf(subject.model, source.tokenizer, plain, "f32", source.name)
        quantise(plain, path, kind)
        plain.unlink()

    def verify(self, subject: Subject, folder: Path) -> Sequence[Check]:
        from ftcli.exporting.gguf.read_back import by_llama_cpp, by_transformers

        path, kind = folder / self.file_name(subject.source), self.stored_dtype(subject.source)
        first = by_transformers(subject, path, kind)
        checks = [first, by_llama_cpp(subject, path, kind, first.difference)] if first.difference is not None else [first]
        fallen = fallen_back(path) if kind in K_QUANTS else ""
        return [Check(f"{kind} with tensors of other types", True, fallen), *checks] if fallen else checks

    def stored_dtype(self, source: Source) -> str:
        return {"bfloat16": "bf16", "float16": "f16"}.get(source.dtype, "f16") if self.dtype == "auto" else self.dtype

    def file_name(self, source: Source) -> str:
        """Of the one file."""
        return f"{source.name}-{self.stored_dtype(source)}.gguf"

    def usage(self, name: str, source: Source) -> str:
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
    further_stops(source.tokenizer)
    vocabulary_of(source.tokenizer, source.tokenizer.vocab_size)
