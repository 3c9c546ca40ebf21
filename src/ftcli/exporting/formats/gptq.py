"""Linear weights in 4 or 8 bits by GPTQ, in the layout of compressed-tensors, which transformers and vLLM load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftcli.errors import MissingExtraError, Problem, RequestError
from ftcli.exporting import weight_only
from ftcli.exporting.calibration import calibration_rows, decoder_layers, layer_by_layer
from ftcli.exporting.checks import Check
from ftcli.exporting.difference import compare, logits_on
from ftcli.exporting.formats.format import Format, Subject
from ftcli.exporting.formats.hf import rounded_state, settle_stops, state_dtype, stop_check
from ftcli.exporting.gptq import Rounded, output_error, rounded, rounded_to_nearest
from ftcli.files import write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ftcli.exporting.source import Source

GROUPS = (128, 64, 32)
"""Lengths of a group of weights with a common scale, the preferred one first."""
_SCALE_BITS = 0.5  # a weight's share of the scales, at most: 16 bits for 32 weights
ROUNDING_FILE = "gptq.json"
"""For every layer how far its outputs are from those of the source."""


class Gptq(Format):
    """Rounded with regard to rows of text: nearer to the source than `int4` at the same size, and run by vLLM's kernels."""

    kind: ClassVar[str] = "gptq"
    dtypes: ClassVar[tuple[str, ...]] = ("int4", "int8")
    reads_data: ClassVar[bool] = True

    @property
    def _bits(self) -> int:
        return 8 if self.dtype == "int8" else 4

    def check(self, source: Source) -> None:
        if find_spec("compressed_tensors") is None:
            raise MissingExtraError("export to GPTQ", "gptq")
        model_type = source.config().get_text_config().model_type
        if model_type == "gpt2":
            raise RequestError("the model cannot be exported", [Problem("config.json", "GPT-2 has no linear layers", "--to int8 or gguf")])
        calibration_rows(source, self.data)

    def num_bytes(self, num_parameters: int, source: Source) -> int:
        return weight_only.num_bytes(num_parameters, source, self._bits + _SCALE_BITS)

    def write(self, subject: Subject, folder: Path) -> None:
        import torch

        source, model = subject.source, subject.model
        dtype = weight_only.outer_dtype(source)
        layers, told = round_layers(model, calibration_rows(source, self.data), self._bits, getattr(torch, dtype))
        settle_stops(model, source.tokenizer)
        state = rounded_state(model, getattr(torch, dtype))
        for name, layer in layers.items():
            del state[f"{name}.weight"]
            state |= {f"{name}.{key}": value for key, value in packed(layer, self._bits).items()}
        model.save_pretrained(folder, state_dict=state, max_shard_size=self.max_shard_bytes)
        state_dtype(folder, dtype)
        _state_quantisation(folder, model, layers, self._bits)
        source.tokenizer.save(folder)
        write_json(folder / ROUNDING_FILE, told)

    def verify(self, subject: Subject, folder: Path) -> Sequence[Check]:
        import torch
        from transformers import AutoModelForCausalLM

        source = subject.source
        dtype = getattr(torch, weight_only.outer_dtype(source))
        with redirect_stderr(StringIO()):  # bars of the library that cannot be turned off otherwise
            loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": source.device})
            logits = logits_on(loaded, source.probe)
        found = compare(subject.expected, logits)
        ours, theirs = dict(subject.model.named_parameters()), dict(loaded.named_parameters())
        wrong = sorted(ours.keys() - theirs.keys())
        wrong += [name for name in ours.keys() & theirs.keys() if not torch.equal(ours[name].to(dtype), theirs[name].to(dtype))]
        detail = f"tensors that differ: {', '.join(wrong[:5])}" if wrong else _told(folder)
        is_near = not wrong and found.kl < weight_only.MAX_KL
        return [Check("the folder, loaded by transformers", is_near, detail, found), stop_check(source.tokenizer, loaded)]

    def stored_dtype(self, source: Source) -> str:
        return f"int{self._bits}"

    def usage(self, name: str, source: Source) -> str:
        return weight_only.usage("compressed-tensors")

    def next_commands(self, output: Path) -> Sequence[str]:
        return [f"vllm serve {output}", *weight_only.next_commands(output)]


def round_layers(
    model: PreTrainedModel, rows: Sequence[list[int]], bits: int, dtype: torch.dtype
) -> tuple[dict[str, Rounded], dict[str, Any]]:
    """({name of a linear layer: its weight}, how far its outputs are from what they were).

    `model` computes with the rounded weights from here on.

    Raises:
        RequestError: no weight can be rounded in groups.
    """
    group = _group_of(model)
    found: dict[str, Rounded] = {}
    errors: dict[str, Any] = {}

    def change(name: str, layer: nn.Module, grams: dict[str, Tensor]) -> None:
        for part, gram in grams.items():
            linear: Any = layer.get_submodule(part)
            weight = linear.weight.detach().float()
            if weight.shape[1] % group:
                continue
            made, plain = rounded(weight, gram, bits, group, dtype), rounded_to_nearest(weight, bits, group, dtype)
            linear.weight.data = made.weight().float()
            found[f"{name}.{part}"] = made
            errors[f"{name}.{part}"] = {
                "output_error": output_error(weight, made.weight(), gram),
                "output_error_rounded_to_nearest": output_error(weight, plain.weight(), gram),
            }

    layer_by_layer(model, rows, change)
    return found, {"bits": bits, "group": group, "tokens": sum(map(len, rows)), "layers": errors}


def _group_of(model: PreTrainedModel) -> int:
    """The length of groups that most weights can have, the longest of those.

    Raises:
        RequestError: no weight has rows of whole groups.
    """
    from torch import nn as layers

    _, stack = decoder_layers(model)
    weights = [module.weight for module in stack.modules() if isinstance(module, layers.Linear)]
    covered = {group: sum(weight.numel() for weight in weights if weight.shape[1] % group == 0) for group in GROUPS}
    best = max(covered, key=lambda group: covered[group])
    if not covered[best]:
        problem = Problem("config.json", f"no linear layer has rows of a multiple of {GROUPS[-1]}", "--to int4, int8 or gguf")
        raise RequestError("the model cannot be exported", [problem])
    return best


def _told(folder: Path) -> str:
    """In words, what ROUNDING_FILE says."""
    told = json.loads((folder / ROUNDING_FILE).read_text(encoding="utf-8"))
    errors = told["layers"].values()
    own, plain = (sum(error[key] for error in errors) / len(errors) for key in ("output_error", "output_error_rounded_to_nearest"))
    layers = f"{len(errors)} linear layers in groups of {told['group']}, rounded by {told['tokens']} tokens"
    return f"{layers}; their outputs are off by {own:.1e} of their squares, rounded to nearest by {plain:.1e}"


def packed(layer: Rounded, bits: int) -> dict[str, Tensor]:
    """The tensors of a linear layer as compressed-tensors names and packs them: neighbours in one int32, the first in the lowest bits."""
    import torch

    per_word = 32 // bits
    offset = (layer.integers.cpu().long() + 2 ** (bits - 1)).unflatten(1, (-1, per_word))
    words = (offset << (torch.arange(per_word) * bits)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return {"weight_packed": words, "weight_scale": layer.scales.cpu(), "weight_shape": torch.tensor(layer.integers.shape)}


def _state_quantisation(folder: Path, model: PreTrainedModel, layers: Mapping[str, Rounded], bits: int) -> None:
    """config.json says how the weights are stored."""
    from torch import nn as torch_layers

    group = next(layer.integers.shape[1] // layer.scales.shape[1] for layer in layers.values())
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group, "dynamic": False}
    others = [name for name, module in model.named_modules() if isinstance(module, torch_layers.Linear) and name not in layers]
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}},
        "ignore": others,
    }
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"quantization_config": settings}, indent=2) + "\n", encoding="utf-8")
