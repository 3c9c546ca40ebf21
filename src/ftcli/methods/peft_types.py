"""What ftcli knows of PEFT's ways to adapt linear layers: learning rates, starts, what each cannot do, and why some are left out.

Learning rates are for a model of width 4096. Each is the best of three or so in 12 to 20 steps of the order task on builtin:tiny
(width 192, `scripts/bench/peft_lr.py`), divided by 4096 / 192; where papers give a rate for a model of about that width, as for
vera (4e-3) and fourierft (3e-3), the two agree. pvera was not measured, and has vera's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ftcli.errors import did_you_mean

RUN_FIELDS = frozenset(("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"))
"""Fields of every configuration of PEFT that say what the run is: ftcli sets them."""


@dataclass(frozen=True, slots=True)
class PeftType:
    """One way to adapt linear layers."""

    lr: float
    """Peak learning rate for a model of width 4096, where the recipe gives none."""
    source: str
    """The paper."""
    start: Mapping[str, Any] = field(default_factory=dict)
    """Values where PEFT's own default is no identity at the start, or no good one."""
    conv1d: bool = False
    """Whether GPT-2's layers can be adapted."""
    decays: bool = True
    """Whether zero is the start of what trains, so that weight decay pulls towards the base."""
    merges: str | None = None
    """Why there are no plain weights that compute the same, where PEFT has none."""


NO_BIAS = "it adds a bias, and layers without one cannot hold it"
ROUTED = "its factors are mixed by a router that looks at every token"

TYPES: dict[str, PeftType] = {
    "beft": PeftType(1e-3, "arXiv:2509.15974", merges=NO_BIAS),
    "boft": PeftType(1e-3, "arXiv:2311.06243", decays=False),
    "c3a": PeftType(1e-2, "arXiv:2407.19342", {"init_weights": True}),
    "deft": PeftType(1e-3, "PEFT 0.21", conv1d=True),
    "delora": PeftType(2e-4, "arXiv:2503.18225", decays=False),
    "fourierft": PeftType(3e-3, "arXiv:2405.03003", {"init_weights": True}, conv1d=True),
    "frod": PeftType(1e-3, "PEFT 0.21", {"progressbar": False}, conv1d=True, decays=False),
    "glora": PeftType(1e-3, "arXiv:2306.07967"),
    "gralora": PeftType(2e-4, "arXiv:2505.20355", conv1d=True),
    "hira": PeftType(3e-3, "OpenReview TwJrTz9cRS", conv1d=True),
    "hra": PeftType(2e-3, "arXiv:2405.17484", decays=False),
    "lily": PeftType(2e-4, "arXiv:2407.09946", merges=ROUTED),
    "loha": PeftType(2e-3, "arXiv:2108.06098"),
    "lokr": PeftType(2e-3, "arXiv:2309.14859"),
    "miss": PeftType(2e-4, "arXiv:2409.15371"),
    "oft": PeftType(2e-4, "arXiv:2306.07280"),
    "osf": PeftType(2e-4, "arXiv:2504.07097", decays=False),
    "peanut": PeftType(2e-4, "arXiv:2410.01870"),
    "psoft": PeftType(2e-4, "OpenReview FSHrinMArK", decays=False),
    "pvera": PeftType(4e-3, "arXiv:2512.07703", conv1d=True),
    "randlora": PeftType(2e-4, "arXiv:2502.00987", conv1d=True),
    "road": PeftType(4e-3, "arXiv:2409.00119", decays=False),
    "shira": PeftType(2e-4, "arXiv:2406.13175"),
    "supertuning": PeftType(4e-3, "arXiv:2607.09287"),
    "tinylora": PeftType(5e-4, "arXiv:2602.04118", conv1d=True),
    "unilora": PeftType(2e-2, "arXiv:2506.00799", conv1d=True),
    "vblora": PeftType(1e-3, "arXiv:2405.15179", conv1d=True),
    "vera": PeftType(4e-3, "arXiv:2310.11454", conv1d=True),
    "waveft": PeftType(2e-4, "arXiv:2505.12532", conv1d=True),
}

# What `type` may not be, and why.
LEFT_OUT = {
    "lora": "it is a kind of its own: `{kind: lora}`",
    "adalora": "it is a kind of its own: `{kind: adalora}`",
    "ia3": "it is a kind of its own: `{kind: ia3}`",
    "ln_tuning": "it trains the weights of the norms, no linear layers",
    "trainable_tokens": "it trains rows of the embedding, no linear layers",
    **dict.fromkeys(("prompt_tuning", "p_tuning", "prefix_tuning"), "it puts virtual tokens before the text, and adapts no linear layers"),
    **dict.fromkeys(
        ("multitask_prompt_tuning", "cpt", "cartridge"), "it needs more than a recipe's examples: task ids, labelled prompts, a cache"
    ),
    "adaption_prompt": "it replaces the attention of Llama, Mistral and GPT-2 by its own, and adapts no linear layers",
    "poly": "it needs a task id with every example",
    "xlora": "it mixes LoRA adapters that are trained already",
    "shadow": "it carries a second model through the layers, and the hidden states that are trained on are no tensors any more",
    "adamss": "it needs scikit-learn, and the masks it is named for are moved by a hook of another trainer",
}
# Fields that PEFT has and a recipe may not set, and what to do instead.
LEFT_OUT_FIELDS = {
    **dict.fromkeys(RUN_FIELDS, "it is the run's own, and ftcli sets it"),
    "target_modules": "it stands beside `type`: `target_modules: [q_proj, ...]`",
    "modules_to_save": "it stands beside `type` as `extra_trained_modules`",
    **dict.fromkeys(
        ("exclude_modules", "layers_to_transform", "layers_pattern"), "`target_modules` beside `type` takes patterns: `layers.[01].*`"
    ),
    "fan_in_fan_out": "it follows from the model",
    "bias": "it would train the base's own biases",
    "use_effective_conv2d": "there are no convolutions in a language model",
    "progressbar": "a run has its own",
    "runtime_offload_base_weight": "the base stays where it is",
    "generator_seed": "noise follows from the run's seed, so that a resumed run draws the same",
    "sample_at_inference": "an evaluation would be another each time",
}
# What the same thing is called by other methods.
_SAME = {"rank": "r", "lora_r": "r"}


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one field of a configuration."""

    name: str
    what: str
    hint: str | None


def faults(kind: str, config: Mapping[str, Any]) -> list[Fault]:
    """Everything that is wrong with the fields of `config` for the PEFT type `kind`, as far as names and types tell.

    Example:
        >>> faults("loha", {"rnak_dropout": 0.1})[0].hint
        'did you mean `rank_dropout`?'
        >>> faults("loha", {"r": "8"})[0].what
        'found text `8`, allowed: a whole number'
    """
    from ftcli.methods.peft_fields import FIELDS

    fields = FIELDS[kind]
    found = []
    for name, value in config.items():
        if name in LEFT_OUT_FIELDS:
            found.append(Fault(name, f"`{name}` is not for a recipe: {LEFT_OUT_FIELDS[name]}", None))
        elif name not in fields:
            found.append(Fault(name, f"PEFT's `{kind}` has no field `{name}`", _meant(name, fields)))
        elif not any(_fits(value, word) for word in fields[name].split("|")):
            words = [_WORDS.get(word, word).replace("'", "`") for word in fields[name].split("|")]
            found.append(Fault(name, f"found {_described(value)}, allowed: {' or '.join(words)}", _unquoted(value, fields[name])))
    return found


def _meant(name: str, fields: Mapping[str, str]) -> str:
    open_fields = [field for field in fields if field not in LEFT_OUT_FIELDS]
    ending = next((field for field in open_fields if name in ("alpha", "dropout") and field.endswith(name)), None)
    same = _SAME.get(name, ending)
    if same in open_fields:
        return f"it is called `{same}` there"
    return did_you_mean(name, open_fields) or f"fields: {', '.join(open_fields)}"


_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "object": "a mapping",
    "array": "a list",
    "null": "null",
    "array of integer": "a list of whole numbers",
    "array of string": "a list of texts",
}


def _fits(value: Any, word: str) -> bool:
    """Is `value` of the type that a word of the table names?"""
    if word.startswith("'"):
        return bool(value == word.strip("'"))
    if word.startswith("array"):
        inner = word.removeprefix("array").removeprefix(" of ").split("/")
        return isinstance(value, list | tuple) and all(inner == [""] or any(_fits(item, part) for part in inner) for item in value)
    if isinstance(value, bool) or word == "boolean":
        return isinstance(value, bool) and word == "boolean"
    types: dict[str, Any] = {"integer": int, "number": int | float, "string": str, "object": dict, "null": type(None)}
    return isinstance(value, types[word])


def _described(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "", str: "text ", list: "the list ", tuple: "the list ", dict: "the mapping "}
    shown = str(value).lower() if isinstance(value, bool) else str(list(value) if isinstance(value, tuple) else value)
    return f"{names.get(type(value), 'the number ')}`{shown}`"


def _unquoted(value: Any, words: str) -> str | None:
    is_number = isinstance(value, str) and value.strip().replace(".", "", 1).replace("-", "", 1).isdigit()
    if is_number and {"integer", "number"} & set(words.split("|")):
        return "write it without quotes"
    return did_you_mean(value, [word.strip("'") for word in words.split("|") if word.startswith("'")]) if isinstance(value, str) else None
