"""What is checked of a merged folder before it gets its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcli.errors import GateError, Problem
from ftcli.merging.plan import Plan, TensorPlan
from ftcli.merging.stored import OpenFiles, folder_tensors

_SPARE_MEMORY = 0.5
"""The result is run only if it takes no more than this share of the memory that is free."""
_PROBED = 64
"""Tokens that are read, from all over the vocabulary."""
_READ = 16
"""Tokens that are read in a row: few, for models of few positions."""
_MAX_KL = {"F32": 1e-6, "F64": 1e-6, "F16": 1e-4, "BF16": 1e-2}
"""Nats per token. float32 products of merged and of separate weights differ by about 1e-8; the others round the changed weights."""


@dataclass(frozen=True, slots=True)
class Proof:
    """One check, and what it found."""

    name: str
    passed: bool
    """False where it could not be made."""
    detail: str


def prove_written(plan: Plan, folder: Path) -> Proof:
    """The files hold the tensors that were planned, and those that were to be copied are equal to their originals bit for bit.

    Raises:
        GateError: they do not.
    """
    found = folder_tensors(folder)
    planned = {tensor.name: (tensor.shape, tensor.dtype) for tensor in plan.tensors}
    if {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} != planned:
        raise GateError("the files do not hold what was planned", [Problem("merge", "names, shapes or dtypes differ")])
    num_compared = 0
    with OpenFiles() as files:
        for tensor in plan.tensors:
            source = plan.sources[tensor.inputs[0].source]
            name = tensor.inputs[0].name
            original = source.tensor(name)
            if not tensor.is_copy or tensor.is_vocabulary or not source.is_as_stored(name) or original.dtype != tensor.dtype:
                continue
            count = min(original.size, 2**16)
            for start in {0, original.size - count}:
                first, second = files.stored(original, start, count), files.stored(found[tensor.name], start, count)
                if first.tobytes() != second.tobytes():
                    raise GateError("a copied tensor is not its original's equal", [Problem(tensor.name, f"copied from `{name}`")])
            num_compared += 1
    copies = f"; {num_compared} copies equal their originals" if num_compared else ""
    return Proof("written as planned", True, f"{len(found)} tensors, all values finite{copies}")


def prove_forward(plan: Plan, folder: Path) -> Proof:
    """The folder loads with transformers, no tensor is missing or left over, and one forward pass gives finite logits.

    Raises:
        GateError: it does not.
    """
    name = "loads and runs"
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError as error:
        return Proof(name, False, f"{error.name} is not installed")
    from ftcli.models.quiet import quiet_libraries

    if plan.config.get("auto_map"):
        return Proof(name, False, "the model brings code of its own, which is not run unasked")
    free = _free_memory()
    if plan.write_bytes > _SPARE_MEMORY * free:
        return Proof(name, False, "the model is too large for the memory that is free")
    with quiet_libraries():
        try:
            config = AutoConfig.from_pretrained(folder)
            if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
                return Proof(name, False, f"transformers has no causal language model for `{config.model_type}`; its configuration loads")
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        except (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
            raise GateError("the merged model does not load", [Problem("merge", str(error).strip().split("\n")[0])]) from error
        model, report = loaded
        missing = [*report["missing_keys"], *report["mismatched_keys"]]
        if missing:
            raise GateError("the merged model is not whole", [Problem("merge", f"missing: {', '.join(map(str, sorted(missing)[:5]))}")])
        rows = model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(min(_READ, rows))[None]
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise GateError("the merged model is not finite", [Problem("merge", "its logits are NaN or infinite")])
    if bool((logits == logits[..., :1]).all()):
        raise GateError("the merged model says nothing", [Problem("merge", "it gives every token the same logit, as one of zeros does")])
    return Proof(name, True, f"with transformers, as {type(model).__name__}; logits of {logits.shape[1]} tokens are finite")


def prove_attached(plan: Plan, folder: Path) -> list[Proof]:
    """Where all that is written is one `model+adapter`: the files compute what PEFT's attached adapter does. Of other merges nothing.

    Raises:
        GateError: they compute something else.
    """
    if not _is_one_adapted_model(plan):
        return []
    source, name = plan.sources[0], "equal to the attached adapter"
    assert source.adapter is not None
    try:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        return [Proof(name, False, f"{error.name} is not installed")]
    from ftcli.exporting.difference import compare, logits_on
    from ftcli.models.quiet import quiet_libraries

    if any(tensor.path.parent != source.folder for tensor in source.tensors.values()) or plan.config.get("auto_map"):
        return [Proof(name, False, "the base is no plain model folder, which PEFT could load")]
    if 8 * sum(tensor.size for tensor in plan.tensors) > _SPARE_MEMORY * _free_memory():
        return [Proof(name, False, "the model is too large to be loaded twice into the memory that is free")]
    with quiet_libraries():
        try:
            base: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype="float32")
            rows = base.get_input_embeddings().weight.shape[0]
            tokens = sorted({rows * index // _PROBED for index in range(_PROBED)})
            probe = [tokens[first :: len(tokens) // _READ or 1] for first in range(len(tokens) // _READ or 1)]
            expected = logits_on(PeftModel.from_pretrained(base, str(source.adapter.folder)), probe)
        except (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
            return [Proof(name, False, f"PEFT cannot attach it: {str(error).strip().splitlines()[0]}")]
        found = logits_on(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), probe)
    difference = compare(expected, found)
    limit = max(_MAX_KL[tensor.dtype] for tensor in plan.tensors if tensor.dtype in _MAX_KL)
    if not difference.kl < limit:
        problem = Problem("merge", f"{difference.line()} (must be below {limit:.0e})", "nothing was written")
        raise GateError("the merged model is not the adapter's equal", [problem])
    return [Proof(name, True, difference.line())]


def _is_one_adapted_model(plan: Plan) -> bool:
    """True when every tensor is the only model's own, and that model has an adapter."""
    is_alone = len(plan.sources) == 1 and plan.sources[0].adapter is not None and plan.vocabulary is None
    return is_alone and all(_is_own(tensor) for tensor in plan.tensors)


def _is_own(tensor: TensorPlan) -> bool:
    is_whole = tensor.is_copy or bool(tensor.settings.get("normalize")) or tensor.settings.get("weight") == (1,)
    return is_whole and [item.name for item in tensor.inputs] == [tensor.name]


def _free_memory() -> int:
    import os

    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**33
