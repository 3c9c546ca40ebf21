"""A GGUF file with the Modelfile from which Ollama makes a model: the same template and stop tokens."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ftcli.exporting.checks import Check
from ftcli.exporting.formats.format import Format, Subject
from ftcli.exporting.formats.gguf import Gguf
from ftcli.exporting.go_template import BATTERY, RAW, turn_texts

if TYPE_CHECKING:
    from ftcli.exporting.source import Source

MODELFILE = "Modelfile"


class Ollama(Format):
    """What `ollama create` reads."""

    kind: ClassVar[str] = "ollama"
    dtypes: ClassVar[tuple[str, ...]] = Gguf.dtypes

    @property
    def _file(self) -> Gguf:
        return Gguf(self.dtype)

    def check(self, source: Source) -> None:
        self._file.check(source)
        modelfile(source, "")

    def num_bytes(self, num_parameters: int, source: Source) -> int:
        return self._file.num_bytes(num_parameters, source)

    def write(self, subject: Subject, folder: Path) -> None:
        self._file.write(subject, folder)
        text = modelfile(subject.source, self._file.file_name(subject.source))
        (folder / MODELFILE).write_text(text, encoding="utf-8")

    def verify(self, subject: Subject, folder: Path) -> Sequence[Check]:
        if subject.source.tokenizer.chat_template is None:
            template = Check("the template", True, "there is none: prompts are taken as they are")
        else:
            template = Check("the template's texts = the chat template", True, f"same text for {len(BATTERY)} conversations")
        ran = Check("the Modelfile, run by Ollama", None, "it would be added to the models of this machine: ollama create")
        return [*self._file.verify(subject, folder), template, ran]

    def stored_dtype(self, source: Source) -> str:
        return self._file.stored_dtype(source)

    def usage(self, name: str, source: Source) -> str:
        return f"```sh\nollama create {name} -f Modelfile\nollama run {name}\n```"

    def next_commands(self, output: Path) -> Sequence[str]:
        name = shlex.quote(output.name)
        return [f"ollama create {name} -f {shlex.quote(str(output / MODELFILE))}", f"ollama run {name}"]


def modelfile(source: Source, file_name: str) -> str:
    """The Modelfile of a GGUF file.

    Raises:
        RequestError: the chat template has no translation.
    """
    tokenizer = source.tokenizer
    template = RAW
    if tokenizer.chat_template is not None:
        template = turn_texts(tokenizer).go(tokenizer.bos_token if tokenizer.adds_bos else None)
    stops = [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in tokenizer.end_texts]
    return "\n".join([f"FROM ./{file_name}", f'TEMPLATE """{template}"""', *stops, ""])
