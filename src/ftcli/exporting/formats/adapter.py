"""An adapter in PEFT's layout, as plain PEFT, vLLM and other servers load it on the original base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ftcli.errors import Problem, RequestError
from ftcli.exporting.checks import Check
from ftcli.exporting.difference import compare, logits_on
from ftcli.exporting.formats.format import Format, Subject
from ftcli.models.added_rows import ROWS_FILE
from ftcli.models.fingerprint import BASE_FILE

if TYPE_CHECKING:
    from ftcli.exporting.source import Source

MAX_KL = 1e-6  # nats per token, between ftcli's adapter and plain PEFT's on the same base
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


class Adapter(Format):
    """The adapter alone, a few megabytes."""

    kind: ClassVar[str] = "adapter"
    dtypes: ClassVar[tuple[str, ...]] = ()
    is_merged: ClassVar[bool] = False

    def check(self, source: Source) -> None:
        adapter_folder(source)

    def num_bytes(self, num_parameters: int, source: Source) -> int:
        return sum(path.stat().st_size for path in adapter_folder(source).iterdir() if path.is_file()) + 2**20

    def write(self, subject: Subject, folder: Path) -> None:
        copy_adapter(subject.source, folder)
        subject.source.tokenizer.save(folder)

    def verify(self, subject: Subject, folder: Path) -> Sequence[Check]:
        """PEFT alone, on a base loaded afresh."""
        from peft import PeftModel

        source = subject.source
        loaded = PeftModel.from_pretrained(source.underlying(), folder).eval()
        found = compare(subject.expected, logits_on(loaded, source.probe))
        return [Check("the files, loaded by PEFT", found.kl < MAX_KL and found.argmax_agreement == 1.0, "", found)]

    def stored_dtype(self, source: Source) -> str:
        return "as trained"

    def usage(self, name: str) -> str:
        return (
            "```python\nfrom peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
            'model = AutoPeftModelForCausalLM.from_pretrained(".")  # fetches the base that adapter_config.json names\n'
            'tokenizer = AutoTokenizer.from_pretrained(".")\n```'
        )

    def next_commands(self, output: Path) -> Sequence[str]:
        return [f"ftcli generate {output} 'Once upon a time'", f"ftcli serve {output}"]


def adapter_folder(source: Source) -> Path:
    """Where the adapter is, in PEFT's layout.

    Raises:
        RequestError: the source has none.
    """
    folder = source.adapter
    if folder is None or not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        what = f"{source.description} holds no adapter in PEFT's layout"
        raise RequestError("there is no adapter to export", [Problem("", what, "--to hf writes the whole model")])
    return folder


def copy_adapter(source: Source, folder: Path) -> None:
    """Write the adapter's weights and its configuration into `folder`."""
    origin = adapter_folder(source)
    shutil.copyfile(origin / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    config = json.loads((origin / CONFIG_FILE).read_text(encoding="utf-8"))
    for name in (ROWS_FILE, BASE_FILE):
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"inference_mode": True}, indent=2) + "\n", encoding="utf-8")
