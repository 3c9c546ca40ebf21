"""A model folder with the linear weights in 8 or 4 bits, as transformers loads it with bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ftcli.exporting.checks import Check
from ftcli.exporting.difference import compare, logits_on
from ftcli.exporting.formats.format import Subject
from ftcli.exporting.formats.hf import stop_check, write_model
from ftcli.models.quantisation import Quantization, is_quantised, loading_arguments, settle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftcli.exporting.source import Source

OUTER_BYTES = 2  # of weights that stay as they are: embeddings, norms, the head
MAX_KL = 1.0  # nats per token: beyond it the rounding is no rounding any more


def num_bytes(num_parameters: int, source: Source, bits: float) -> int:
    """Disk for the folder and, while it is made, for the merged model in 16 bits."""
    return int(num_parameters * (bits / 8 + OUTER_BYTES)) + 2**24


def outer_dtype(source: Source) -> str:
    """Of the weights that are not quantised."""
    return source.dtype if source.dtype in ("bfloat16", "float16", "float32") else "float32"


def write_quantised(subject: Subject, folder: Path, quantization: Quantization) -> None:
    """Write the model with its linear layers stored as `quantization` says; the head and all else keep 16 or 32 bits."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = outer_dtype(subject.source)
    with TemporaryDirectory(dir=folder) as plain:
        write_model(subject, Path(plain), dtype, 10**12)
        loaded = AutoModelForCausalLM.from_pretrained(
            plain, dtype=getattr(torch, dtype), device_map={"": subject.source.device}, **loading_arguments(quantization, "cpu")
        )
        loaded.config._name_or_path = ""
        loaded.save_pretrained(folder)
    subject.source.tokenizer.save(folder)


def verify_quantised(subject: Subject, folder: Path, quantization: Quantization) -> Sequence[Check]:
    """What transformers makes of the folder; on a CPU with the products of the dequantised weights, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    source = subject.source
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, outer_dtype(source)), device_map={"": source.device}
    )
    settle(loaded, quantization, source.device)
    num_layers = sum(is_quantised(module) for module in loaded.modules())
    found = compare(subject.expected, logits_on(loaded, source.probe))
    detail = f"{num_layers} linear layers quantised"
    return [
        Check("the folder, loaded by transformers", num_layers > 0 and found.kl < MAX_KL, detail, found),
        stop_check(source.tokenizer, loaded),
    ]


def usage(package: str = "bitsandbytes") -> str:
    """Markdown: how the folder is loaded, with `package` installed."""
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer  # needs PACKAGE\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")\n```'
    ).replace("PACKAGE", package)


def next_commands(output: Path) -> Sequence[str]:
    """Python, because `ftcli generate` loads plain weights."""
    code = f"from transformers import pipeline; print(pipeline('text-generation', '{output}')('Once upon a time'))"
    return [f'python -c "{code}"']
