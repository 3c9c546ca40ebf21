"""Which layout each architecture of transformers gets, found by running the probe on a tiny random model of it.

    python scripts/architectures.py [NAME ...] > docs/architectures.md

Without names: every causal language model of transformers. The tiny models are made as `ftcli train --smoke` makes them. The probe
sees ragged texts, a tree with branches, and a text longer than the sliding window where there is one. A LoRA adapter and dropout
change nothing of what is decided here; a run decides anew, on its own model and data.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

TIMEOUT_SECONDS = 300
VOCABULARY, WINDOW, MAX_LENGTH = 128, 24, 64
# What the default configuration leaves out, or has for more layers than two, and every checkpoint names.
NAMED = {
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 128},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        }
    },
    "nemotron": {"num_key_value_heads": 2},
}
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Row:
    """What the probe says of one architecture."""

    architecture: str
    layout: str
    """forest, rows, or - where not even rows can be had."""
    reason: str
    log_probs: float | None = None
    gradients: float | None = None


def probed(architecture: str) -> Row:
    """The probe's choice for a tiny random model."""
    import numpy as np
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    from ftcli.errors import FtcliError
    from ftcli.layout.model import TreeModel
    from ftcli.layout.probe import ARCHITECTURE_ERRORS, _path, choose_layout
    from ftcli.models.load import load_model

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        model = load_model(tiny_settings(architecture), None, seed=3)
    except FtcliError as error:
        return Row(architecture, "-", f"no tiny model: {first_line(error.problems[0].what if error.problems else error.summary)}")
    except (*ARCHITECTURE_ERRORS, ImportError, OSError, StrictDataclassError) as error:
        return Row(architecture, "-", f"no tiny model: {type(error).__name__}: {first_line(str(error))}")
    generator = np.random.default_rng(0)
    trees = [_path(generator.integers(3, VOCABULARY, length)) for length in (12, 30, 17)]
    try:
        model.requires_grad_(True)
        choice = choose_layout(TreeModel(model), trees, "auto", frozenset({"forest", "rows"}), MAX_LENGTH)
    except FtcliError as error:
        return Row(architecture, "-", first_line(error.summary))
    except ARCHITECTURE_ERRORS as error:
        return Row(architecture, "-", f"rows fail: {type(error).__name__}: {first_line(str(error))}")
    return Row(architecture, choice.layout, choice.reason, choice.log_prob_difference, choice.gradient_difference)


def tiny_settings(architecture: str) -> Any:
    """A tiny model of the architecture's default configuration, with a sliding window that the probe exceeds."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from ftcli.models.settings import Init, Model
    from ftcli.models.tiny import tiny_init

    init = tiny_init(CONFIG_MAPPING[architecture]())
    known = CONFIG_MAPPING[init.architecture].__dataclass_fields__
    window = {"sliding_window": WINDOW} if init.config.get("sliding_window") or "sliding_window" in known else {}
    wanted = {name: value for name, value in {**TOKENS, **window}.items() if name in known}
    fields = {**init.config, **wanted, **NAMED.get(init.architecture, {})}
    return Model(init=Init(architecture=init.architecture, config=fields), tokenizer="builtin:tiny")


def first_line(text: str) -> str:
    lines = text.strip().splitlines() or [""]
    return lines[0].replace("|", "\\|")[:160]


def probe_apart(architecture: str) -> Row:
    """The same in a process of its own: what crashes or never ends takes nobody with it."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(probed(architecture)), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(TIMEOUT_SECONDS):
            return receiver.recv()  # type: ignore[no-any-return]
        return Row(architecture, "-", f"no answer within {TIMEOUT_SECONDS} s")
    except EOFError:
        return Row(architecture, "-", "the process died")
    finally:
        process.kill()
        process.join()


def page(rows: list[Row], command: str) -> str:
    """The table in Markdown, forest first."""
    import torch
    import transformers

    order = ("forest", "rows", "-")
    counts = Counter(row.layout for row in rows)
    lines = [
        "# Which layout an architecture gets",
        "",
        f"Output of `{command}` (transformers {transformers.__version__}, torch {torch.__version__}, CPU, float32).",
        "",
        "A tiny random model of each architecture went through the probe that every run goes through (`src/ftcli/layout/probe.py`):",
        "the flat *forest* is taken only if its log-probabilities and gradients equal those of padded *rows*, and rows only if they",
        "equal the model's own forward pass over each branch alone. A run never reads this table: it decides on its own model and data.",
        "",
        f"Of {len(rows)} architectures {counts['forest']} get the forest, {counts['rows']} fall back to rows, and {counts['-']} cannot be",
        "trained or could not be made tiny. Differences are between the layouts: nats per token, and of gradients relative to their",
        "largest entry.",
        "",
        "| architecture | layout | log-probabilities | gradients | reason |",
        "|---|---|--:|--:|---|",
    ]
    for row in sorted(rows, key=lambda row: (order.index(row.layout), row.architecture)):
        figures = ["" if value is None else f"{value:.0e}" for value in (row.log_probs, row.gradients)]
        lines.append(f"| {row.architecture} | {row.layout} | {figures[0]} | {figures[1]} | {row.reason} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="Model types of transformers; all causal language models without any.")
    names = parser.parse_args().names
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    import ftcli.layout.probe
    import ftcli.models.load  # noqa: F401  # imported once, before the processes that all need them

    rows = []
    for name in names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        rows.append(probe_apart(name))
        print(f"{name}: {rows[-1].layout} ({rows[-1].reason})", file=sys.stderr, flush=True)
    print(page(rows, " ".join(["python scripts/architectures.py", *names])), end="")


if __name__ == "__main__":
    main()
