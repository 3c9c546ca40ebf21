"""An ONNX graph of the logits, through torch's exporter.

It has no key/value cache: one call reads whole texts, for scoring, embedding into other programs, or short answers. Answers of any
length are better served by the other formats.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftcli.errors import MissingExtraError, Problem, RequestError
from ftcli.exporting.checks import Check
from ftcli.exporting.difference import compare
from ftcli.exporting.formats.format import Format, Subject
from ftcli.exporting.formats.hf import settle_stops

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from ftcli.exporting.source import Source

FILE = "model.onnx"
MAX_DIFFERENCE = 1e-4  # of a logit, as a share of the largest; onnxruntime sums in another order
EXTERNAL_BYTES = 2**30  # weights above this go into a file of their own: the format ends at 2 GiB
INPUTS = ("input_ids", "attention_mask")


class Onnx(Format):
    """Logits from token ids and a mask, for onnxruntime."""

    kind: ClassVar[str] = "onnx"
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)

    def check(self, source: Source) -> None:
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("export to ONNX", "onnx") from error

    def num_bytes(self, num_parameters: int, source: Source) -> int:
        return 4 * num_parameters + 2**24

    def write(self, subject: Subject, folder: Path) -> None:
        model, source = subject.model, subject.source
        program = _exported(model)
        num_bytes = sum(parameter.numel() for parameter in model.parameters()) * 4
        program.save(folder / FILE, external_data=num_bytes > EXTERNAL_BYTES)
        settle_stops(model, source.tokenizer)
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        source.tokenizer.save(folder)

    def verify(self, subject: Subject, folder: Path) -> Sequence[Check]:
        import torch

        rows = [_run(folder, [ids]) for ids in subject.source.probe]
        found = torch.cat([row[0] for row in rows])
        largest = float((found - subject.expected).abs().max() / subject.expected.abs().max())
        detail = f"largest difference of a logit {largest:.1e} of the largest logit"
        equal = Check("the graph, run by onnxruntime", largest < MAX_DIFFERENCE, detail, compare(subject.expected, found))
        return [equal, _padding_check(subject, folder)]

    def stored_dtype(self, source: Source) -> str:
        return "float32"

    def usage(self, name: str, source: Source) -> str:
        return (
            "```python\nimport numpy as np\nimport onnxruntime\nfrom transformers import AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained(".")\nsession = onnxruntime.InferenceSession("model.onnx")\n'
            'inputs = tokenizer("Once upon a time", return_tensors="np")\n'
            "logits, = session.run(None, {name: inputs[name].astype(np.int64) for name in "
            '("input_ids", "attention_mask")})\n```'
        )

    def next_commands(self, output: Path) -> Sequence[str]:
        return [f"python -c 'import onnxruntime; print(onnxruntime.InferenceSession(\"{output / FILE}\").get_inputs())'"]


def _exported(model: PreTrainedModel) -> Any:
    """The model as a graph with free sizes of batch and length.

    Raises:
        RequestError: torch's exporter cannot follow the model's code.
    """
    import torch

    class Logits(torch.nn.Module):
        """The part of the model that the graph computes."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
            return logits

    ids = torch.arange(12, device=model.device).reshape(2, 6) % model.config.get_text_config().vocab_size
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with _quiet_exporter(), torch.no_grad():
            return torch.onnx.export(
                Logits().eval(),
                (ids, torch.ones_like(ids)),
                dynamo=True,
                input_names=list(INPUTS),
                output_names=["logits"],
                dynamic_shapes=(free, free),
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as error:
        first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RequestError("the model cannot become an ONNX graph", [Problem("", first_line, "--to gguf or --to hf")]) from error


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """torch's exporter says at every call which optional packages it has not got."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _run(folder: Path, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """(length, vocabulary) logits of each row, computed as one batch padded on the left."""
    import numpy as np
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
    longest = max(map(len, rows))
    ids = np.array([[0] * (longest - len(row)) + list(row) for row in rows], dtype=np.int64)
    mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=np.int64)
    (logits,) = session.run(None, dict(zip(INPUTS, (ids, mask), strict=True)))
    return [torch.from_numpy(logits[index, longest - len(row) :]) for index, row in enumerate(rows)]


def _padding_check(subject: Subject, folder: Path) -> Check:
    """A batch of two lengths, against transformers with the same padding and mask."""
    import torch

    longer = subject.source.probe[0][:16]
    shorter = longer[: max(1, len(longer) // 2)]
    pad = len(longer) - len(shorter)
    device = subject.model.device
    ids = torch.tensor([longer, [0] * pad + shorter], device=device)
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    with torch.no_grad():
        expected = subject.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().cpu()
    own = torch.cat([expected[0], expected[1, pad:]])
    found = torch.cat(_run(folder, [longer, shorter]))
    largest = float((found - own).abs().max() / own.abs().max())
    return Check("a padded batch, run by onnxruntime", largest < MAX_DIFFERENCE, f"largest difference {largest:.1e}", compare(own, found))
