"""Turns what pydantic finds wrong into problems: the path as it was written, the value, what is allowed, a hint."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from ftcli.errors import did_you_mean
from ftcli.recipe.schema import Node, allowed, homes, json_schema, kinds, locate, resolved
from ftcli.recipe.yaml import KeyPath, describe, dotted, scalar

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

CLOSE = 0.75  # among all keys of the language some are always a little alike
Finding = tuple[KeyPath, str, str | None]
"""KeyPath of what is wrong, what is wrong, hint."""


# What other trainers call it, and where it stands here.
FOREIGN_KEYS = {
    **dict.fromkeys(("base_model", "model_name", "model_name_or_path", "model_id"), "model.base"),
    **dict.fromkeys(("tokenizer_name", "tokenizer_name_or_path"), "model.tokenizer"),
    **dict.fromkeys(("chat_template", "prompt_template"), "model.template"),
    **dict.fromkeys(("datasets", "train_dataset", "train_file", "data_path"), "data.train"),
    **dict.fromkeys(("eval_dataset", "test_datasets", "validation_dataset", "validation"), "data.evaluation"),
    **dict.fromkeys(("val_set_size", "validation_split", "test_size"), "data.holdout"),
    **dict.fromkeys(("sequence_len", "max_seq_length", "max_seq_len", "seq_length", "cutoff_len", "model_max_length"), "data.max_length"),
    **dict.fromkeys(("lora_r", "lora_rank", "r"), "method.rank"),
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    **dict.fromkeys(("lora_target_modules", "lora_target", "modules"), "method.target_modules"),
    "modules_to_save": "method.extra_trained_modules",
    **dict.fromkeys(("train_on_inputs", "train_on_prompt", "mask_prompt"), "objective.prompt_loss_weight"),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "max_epochs"), "train.epochs"),
    **dict.fromkeys(("max_steps", "iters", "num_steps", "max_iters"), "train.steps"),
    **dict.fromkeys(("learning_rate", "max_lr", "peak_lr"), "train.lr"),
    **dict.fromkeys(("batch_size", "train_batch_size", "effective_batch_size", "total_batch_size"), "train.global_batch_size"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler"), "train.schedule"),
    **dict.fromkeys(("optim", "optimizer_type"), "train.optimizer"),
    **dict.fromkeys(("gradient_clipping", "grad_clip", "clip_grad_norm", "gradient_clip_val"), "train.max_grad_norm"),
    **dict.fromkeys(("bf16", "fp16", "precision"), "train.mixed_precision"),
    **dict.fromkeys(("activation_checkpointing", "grad_checkpoint"), "train.gradient_checkpointing"),
    "torch_compile": "train.compile",
    **dict.fromkeys(("logging_steps", "log_every", "log_interval", "steps_per_report"), "every.log"),
    **dict.fromkeys(("eval_steps", "eval_every", "steps_per_eval"), "every.evaluate"),
    **dict.fromkeys(("save_steps", "save_every", "save_interval", "checkpoint_every"), "every.save"),
    "save_total_limit": "every.keep",
    **dict.fromkeys(("report_to", "log_with", "loggers"), "trackers"),
    **dict.fromkeys(("output_dir", "out_dir", "adapter_path", "run_folder"), "output"),
}
FOREIGN_KINDS = {
    "prefix_tuning": "prefix",
    **dict.fromkeys(("prompt_tuning", "soft_prompt"), "prompt"),
    "ptuning": "p_tuning",
    **dict.fromkeys(("bottleneck", "bottleneck_adapter"), "adapter"),
    **dict.fromkeys(("full_finetuning", "full_fine_tuning", "sft"), "full"),
    "half_fine_tuning": "hft",
    "adapter_drop": "adapter",
}
_NOT_NEEDED = {
    **dict.fromkeys(
        ("gradient_accumulation_steps", "grad_accumulation_steps", "per_device_train_batch_size", "micro_batch_size"),
        "give `train.global_batch_size`; how it is cut follows from `train.micro_batch_tokens`",
    ),
    **dict.fromkeys(("packing", "sample_packing", "pad_to_sequence_len", "group_by_length", "padding_free"), "batches have no padding"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization", "bits"), "`method: {kind: qlora}` quantises the base"),
}


def explain(errors: Sequence[ErrorDetails], data: dict[str, Any], schema: Node | None = None) -> list[Finding]:
    """One finding for each thing that is wrong, in the order of the errors.

    Args:
        errors: of validating `data` as a recipe; a union without `kind` gives several for one value.
        data: the document.
        schema: of the kind of document; the default is a recipe's.
    """
    root = json_schema() if schema is None else schema
    findings: dict[tuple[KeyPath, str], Finding] = {}
    for error in errors:
        # a default that depends on values that are wrong themselves
        if error["type"] == "default_factory_not_called":
            continue
        # pydantic counts a list's valid items only: a long list of wrong ones is "too short", too
        if error["type"] == "too_short" and error["ctx"]["actual_length"] < len(value_at(data, locate(error["loc"], root)[0]) or ()):
            continue
        path, what, hint = _finding(error, data, root)
        findings.setdefault((path, what), (path, what, hint))
    # Of a number or a mapping, a mapping is no wrong number: what is wrong inside it is told.
    told = [path for path, _, _ in findings.values()]
    return [
        finding
        for finding in findings.values()
        if not (finding[1].startswith("found a mapping") and any(path[: len(finding[0])] == finding[0] != path for path in told))
    ]


def _finding(error: ErrorDetails, data: dict[str, Any], root: Node) -> Finding:
    path, around, node = locate(error["loc"], root)
    match error["type"]:
        case "extra_forbidden":
            return path, "unknown key", _unknown_key_hint(path, around, data)
        case "missing":
            return path[:-1], f"missing key `{path[-1]}`", _missing_key_hint(str(path[-1]), node, root)
        case "union_tag_not_found":
            return path, "missing key `kind`", f"kinds: {', '.join(kinds(node, root))}"
        case "union_tag_invalid":
            return _unknown_kind(path, kinds(node, root), data)
        case "literal_error" if path and path[-1] == "kind":
            return _unknown_kind(path[:-1], {name: {} for name in _constants(node)}, data)
        case "value_error" | "assertion_error":
            context = error.get("ctx", {})
            return path, str(context.get("error", error["msg"])), context.get("hint")
    value = value_at(data, path)
    return path, f"found {describe(value)}, allowed: {allowed(node, root)}", _value_hint(value, node, root)


def value_at(data: Any, path: KeyPath) -> Any:
    """What stands at `path`, None where nothing does."""
    for element in path:
        is_there = element in data if isinstance(data, dict) else isinstance(data, list) and element in range(len(data))
        if not is_there:
            return None
        data = data[element]
    return data


def _unknown_kind(path: KeyPath, choices: dict[str, Node], data: dict[str, Any]) -> Finding:
    found = value_at(data, (*path, "kind"))
    what, word = f"unknown kind `{found}`", str(found)
    # `dora` is no method but a variant of one
    for kind, choice in choices.items():
        for key, node in choice.get("properties", {}).items():
            if word in node.get("enum", ()):
                return path, what, f"write `{{kind: {kind}, {key}: {word}}}`"
    if (own := FOREIGN_KINDS.get(word.lower().replace("-", "_"))) in choices:
        return path, what, f"it is called `{own}` here"
    return path, what, did_you_mean(word, list(choices)) or f"kinds: {', '.join(choices)}"


def _constants(node: Node) -> list[str]:
    return [str(value) for value in node.get("enum", [node.get("const")])]


def _unknown_key_hint(path: KeyPath, around: Node, data: dict[str, Any]) -> str:
    """Where the key belongs, or which key is meant, or which keys there are."""
    key, parent = str(path[-1]), tuple("N" if isinstance(element, int) else element for element in path[:-1])
    siblings = list(around.get("properties", {}))
    places = homes().get(key, ())
    if other_kinds := [kind for place, kind in places if place == parent and kind is not None]:
        own = value_at(data, (*path[:-1], "kind"))
        return f"`{key}` belongs to kind {', '.join(f'`{kind}`' for kind in other_kinds)}, not `{own}`"
    parents = list(dict.fromkeys(place for place, _ in places if key != "kind"))
    if 0 < len(parents) <= 3:
        named = [f"`{dotted(place)}`" if place else "the top level" for place in parents]
        return f"`{key}` belongs under {' or '.join(named)}" if parents != [()] else f"`{key}` belongs at the top level"
    if key.lower() in FOREIGN_KEYS:
        return f"it is called `{FOREIGN_KEYS[key.lower()]}` here"
    return (
        _NOT_NEEDED.get(key.lower())
        or did_you_mean(key, siblings)
        or _misspelt_elsewhere(key)
        or f"keys here: {', '.join(siblings) or 'none'}"
    )


def _misspelt_elsewhere(key: str) -> str | None:
    if len(key) < 4 or (hint := did_you_mean(key, list(homes()))) is None:
        return None
    near = hint.split("`")[1]
    if SequenceMatcher(None, key, near).ratio() < CLOSE:
        return None
    # a key of one kind only is as strange here as the misspelt one
    anywhere = [place for place, kind in homes()[near] if kind is None]
    return f"did you mean `{dotted((*anywhere[0], near))}`?" if anywhere else None


def _missing_key_hint(key: str, node: Node, root: Node) -> str | None:
    if names := list(kinds(node, root)):
        return f"`{key}: {{kind: ...}}` with kind {', '.join(names)}"
    if "const" in node:
        return f"`{key}: {node['const']}`"
    description = _description(node)
    return f"`{key}`: {description}" if description else None


def _description(node: Node) -> str | None:
    """The field's docstring as a hint."""
    text = " ".join(str(node.get("description", "")).split()).removesuffix(".")
    return text[:1].lower() + text[1:] or None


def _examples(choices: dict[str, Node]) -> str:
    """How each kind is written, in short."""
    return " or ".join(_example(choice) for choice in choices.values())


def _example(node: Node, text: str = "...") -> str:
    """A mapping with the keys it cannot do without, or with its first; `text` stands for a value that is one text.

    Example:
        >>> _example({"properties": {"kind": {"const": "file"}, "path": {"type": "string"}}, "required": ["kind", "path"]})
        '`{kind: file, path: ...}`'
    """
    keys = node.get("required") or list(node["properties"])[:1]
    nodes = {key: node["properties"][key] for key in sorted(keys, key=lambda key: key != "kind")}
    holds_text = len(nodes) == 1 and "string" in {choice.get("type") for inner in nodes.values() for choice in inner.get("anyOf", [inner])}
    value = f'"{text}"' if holds_text and ":" in text else text if holds_text else "..."
    return "`{" + ", ".join(f"{key}: {inner.get('const', value)}" for key, inner in nodes.items()) + "}`"


_TRUTHS = {"yes": "true", "on": "true", "y": "true", "1": "true", "no": "false", "off": "false", "n": "false", "0": "false"}


def _value_hint(value: Any, node: Node, root: Node) -> str | None:
    """How to write what was probably meant."""
    types = {node.get("type")} | {resolved(choice, root).get("type") for choice in node.get("anyOf", ())}
    is_mapping = bool(kinds(node, root)) or "properties" in node
    if value is None and (is_mapping or "array" in types):
        return "what belongs to it stands on the lines below it, indented by two more spaces"
    if isinstance(value, dict) and "array" in types:
        return "begin every entry with `- `"
    if isinstance(value, str):
        return _text_hint(value, node, root, types)
    if "integer" in types and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if "boolean" in types and value in (0, 1):
        return f"write {_TRUTHS[str(value)]}"
    if "array" in types and value is not None and not isinstance(value, list):
        return "put it in brackets: `[...]`"
    if types == {"string"} and isinstance(value, bool | int | float):
        return f'put it in quotes: "{value}"'
    return None


def _text_hint(text: str, node: Node, root: Node, types: set[Any]) -> str | None:
    if choices := kinds(node, root):
        return f"write `{{kind: {text}}}`" if text in choices else did_you_mean(text, list(choices)) or f"write {_examples(choices)}"
    if "properties" in node:
        return f"write {_example(node, text)}"
    if "${" in text:
        return "`${...}` is replaced in paths and names only"
    if types & {"integer", "number"} and isinstance(scalar(text.strip()), int | float):
        return "write it without quotes"
    if "boolean" in types and text.lower() in {**_TRUTHS, "true": "", "false": ""}:
        return f"write {_TRUTHS.get(text.lower(), text.lower())}"
    if "enum" in node:
        return did_you_mean(text, _constants(node))
    if "array" in types:
        entry = f"{{kind: {text}}}" if text in kinds(node.get("items", {}), root) else text
        return f"put it in brackets: `[{entry}]`"
    return None
