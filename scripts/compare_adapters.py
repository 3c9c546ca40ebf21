"""Do ftcli's bottleneck adapters compute what AdapterHub's library computes, on the same weights?

Makes an environment of its own for the reference (adapters 1.3.0 wants another transformers than ftcli), gives both sides the same
tiny model and the same adapter, and compares hidden states and logits.

    python scripts/compare_adapters.py                      # takes minutes the first time: it installs torch
    python scripts/compare_adapters.py --environment DIR    # keep the environment, or use one that is there
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

REQUIREMENTS = ("adapters==1.3.0", "transformers~=4.57.6", "torch==2.13.0", "huggingface_hub<1")
TOLERANCE = 1e-5
VOCABULARY, SEED = 101, 7
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "max_position_embeddings": 64,
    },
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 64},
}
# Settings here; name and settings in the reference.
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "houlsby": ({"preset": "houlsby"}, "double_seq_bn", {}),
    "pfeiffer": ({"preset": "pfeiffer"}, "seq_bn", {}),
    "parallel": ({"preset": "parallel"}, "par_bn", {}),
    "houlsby, norm before": ({"preset": "houlsby", "norm_before": True}, "double_seq_bn", {"ln_before": True}),
    "pfeiffer, norm after": ({"preset": "pfeiffer", "norm_after": True}, "seq_bn", {"ln_after": True}),
    "pfeiffer, gelu, other width, not in layer 1": (
        {"preset": "pfeiffer", "non_linearity": "gelu", "reduction_factor": {"0": 8.0, "default": 16.0}, "leave_out": (1,)},
        "seq_bn",
        {"non_linearity": "gelu", "reduction_factor": {"0": 8, "default": 16}, "leave_out": [1]},
    ),
    "parallel, also at attention, learned scaling": (
        {"preset": "parallel", "mh_adapter": True, "scaling": "learned"},
        "scaled_par_bn",
        {"mh_adapter": True},
    ),
}
PARTS = {"adapter_down.0.": "down.", "adapter_down.1.": "down.", "adapter_up.": "up.", "adapter_norm_": "norm_"}
PLACES = {
    "llama": {"attention_adapters": "self_attn", "output_adapters": "mlp"},
    "gpt2": {"attention_adapters": "attn", "output_adapters": "mlp"},
}


def main() -> None:
    """Compare every model with every adapter; exit code 1 where one differs by more than the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, help="the reference's environment; made where there is none")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reference is not None:
        compute_reference(options.reference)
        return
    with tempfile.TemporaryDirectory() as temporary:
        python = reference_python(options.environment or Path(temporary) / "environment")
        rows = [compare(python, Path(temporary), model, case) for model in MODELS for case in CASES]
    print("| model | adapter | tensors | largest difference: hidden states | logits | adapter changes logits by |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        numbers = f"{row['hidden']:.1e} | {row['logits']:.1e} | {row['effect']:.2f}"
        print(f"| {row['model']} | {row['case']} | {row['tensors']} | {numbers} |")
    sys.exit(any(max(row["hidden"], row["logits"]) > TOLERANCE for row in rows))


def reference_python(folder: Path) -> Path:
    """The interpreter of the reference's environment, which is made and filled where it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing {', '.join(REQUIREMENTS)}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    return python


def compare(python: Path, temporary: Path, model: str, case: str) -> dict[str, Any]:
    """Largest differences over all layers' hidden states and over the logits."""
    folder = Path(tempfile.mkdtemp(dir=temporary))
    ours = compute_ours(folder, model, case)
    subprocess.run([python, __file__, "--reference", folder], check=True)
    theirs = load_file(folder / "reference.safetensors")
    hidden = [name for name in ours if name.startswith("hidden.")]
    assert ours.keys() == theirs.keys()
    return {
        "model": model,
        "case": case,
        "tensors": len(load_file(folder / "adapter.safetensors")),
        "hidden": max(float((ours[name] - theirs[name]).abs().max()) for name in hidden),
        "logits": float((ours["logits"] - theirs["logits"]).abs().max()),
        "effect": float((ours["logits"] - ours["base"]).abs().max()),
    }


def token_ids() -> torch.Tensor:
    """(3, 17) the same on both sides."""
    return torch.randint(3, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(SEED))


def compute_ours(folder: Path, model: str, case: str) -> dict[str, torch.Tensor]:
    """Write base and adapter with random weights, none of them zero, and compute with ftcli."""
    from ftcli.methods.bottleneck.files import adapter_tensors
    from ftcli.methods.bottleneck_adapter import BottleneckAdapter
    from ftcli.methods.context import AttachContext
    from ftcli.models.load import load_model
    from ftcli.models.settings import Init, Model

    special = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
    base: Any = load_model(Model(init=Init(architecture=model, config={**special, **MODELS[model]})), None, seed=SEED).eval()
    base.save_pretrained(folder / "base")
    with torch.no_grad():
        plain = base(token_ids(), use_cache=False).logits
    module: Any = BottleneckAdapter(**CASES[case][0]).attach(base, AttachContext(seed=SEED)).eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        output = module(token_ids(), use_cache=False, output_hidden_states=True)
    save_file({name: tensor.contiguous() for name, tensor in adapter_tensors(module).items()}, folder / "adapter.safetensors")
    (folder / "case.json").write_text(json.dumps({"model": model, "case": case}))
    return _found(output) | {"base": plain}


def _found(output: Any) -> dict[str, torch.Tensor]:
    hidden = {f"hidden.{index}": state.contiguous() for index, state in enumerate(output.hidden_states)}
    return hidden | {"logits": output.logits.contiguous()}


def compute_reference(folder: Path) -> None:
    """The same with AdapterHub's library; runs in its own environment and imports nothing of ftcli."""
    import adapters  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    case = json.loads((folder / "case.json").read_text())
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapters.init(model)
    with torch.no_grad():
        base = model.eval()(token_ids(), use_cache=False).logits
    _, name, changes = CASES[case["case"]]
    model.add_adapter("compared", config=adapters.AdapterConfig.load(name, **changes))
    model.set_active_adapters("compared")
    given = load_file(folder / "adapter.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".compared." in name:
                parameter.copy_(given.pop(our_name(name, case["model"])))
        output = model.eval()(token_ids(), use_cache=False, output_hidden_states=True)
    assert not given, f"tensors that the reference has no place for: {sorted(given)}"
    save_file(_found(output) | {"base": base.contiguous()}, folder / "reference.safetensors")


def our_name(name: str, model: str) -> str:
    """What ftcli calls a parameter of the reference."""
    before, _, part = name.partition(".adapters.compared.")
    layer, _, place = before.rpartition(".")
    for theirs, ours in PARTS.items():
        part = part.replace(theirs, ours)
    return f"base_model.model.{layer}.{PLACES[model][place]}.bottleneck_adapters.{part}"


if __name__ == "__main__":
    main()
