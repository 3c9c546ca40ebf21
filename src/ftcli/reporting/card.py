"""README.md: the model card of a run, as the Hugging Face Hub reads it. It names no folder of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftcli.files import write_text
from ftcli.reporting.diagnosis.diagnose import diagnose
from ftcli.reporting.found_run import FoundRun, base_name, read_run
from ftcli.reporting.live import evaluation_table
from ftcli.reporting.markdown import inline, table
from ftcli.units import format_seconds

CARD = "README.md"
_PLAIN = re.compile(r"[\w./: -]+")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHOWN_SETTINGS = ("epochs", "steps", "global_batch_size", "lr", "optimizer", "schedule", "max_grad_norm", "mixed_precision", "seed")


def write_card(run_folder: Path) -> None:
    """Write README.md into a run folder, from what the folder holds."""
    write_text(run_folder / CARD, card_text(read_run(run_folder)))


def card_text(run: FoundRun) -> str:
    """The card as Markdown."""
    kind = "An adapter for" if run.artefact == "adapter" else "A fine-tuned copy of"
    results = [row.cells() for row in evaluation_table(run.before, run.after)]
    sections = [
        ("Results", table(["source", "measure", "before", "after", "change"], results)),
        ("How to load it", f"```python\n{loading_snippet(run)}```"),
        ("Known faults", "\n".join(f"- {inline(finding.name)}: {inline(finding.sentence)}" for finding in diagnose(run).findings)),
        ("Training data", _data(run)),
        ("Method and hyperparameters", table(["setting", "value"], _settings(run))),
        ("Proofs", _proofs(run)),
        ("Versions", inline(", ".join(f"{name} {version}" for name, version in run.versions.items()))),
    ]
    body = "\n\n".join(f"## {title}\n\n{content}" for title, content in sections if content)
    base = f"`{run.base}`" if _PLAIN.fullmatch(run.base) else inline(run.base)
    intro = f"{kind} {base}, trained with {inline(run.method)} for {run.step} steps"
    intro += f" in {format_seconds(run.seconds)}" if run.seconds is not None else ""
    return f"{_front_matter(run)}\n# {inline(run.name)}\n\n{intro}.\n\n{body}\n"


def loading_snippet(run: FoundRun) -> str:
    """Python that loads the result and asks it once; it works in the run's folder."""
    artefact = run.artefact or "model"
    if _mapping(run.recipe.get("method")).get("kind") == "features":
        # A classifier of its own over the base's features: no other tool knows it.
        lines = ["from pathlib import Path", "", "from ftcli.exporting.predict import predict_file", ""]
        return "\n".join([*lines, 'print(predict_file(".", Path("rows.jsonl")))']) + "\n"
    auto = "AutoModelForSequenceClassification" if _has_head(run) else "AutoModelForCausalLM"
    imports, lines = _load_adapter(run, auto) if artefact == "adapter" else ([], [f'model = {auto}.from_pretrained("model")'])
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{artefact}")')
    if _has_head(run):
        lines += ['inputs = tokenizer("A text.", return_tensors="pt")', "print(model(**inputs).logits)", *_label_line(run)]
    else:
        lines += _ask_once((run.path / artefact / "chat_template.jinja").is_file())
    return "\n".join([*sorted(imports), f"from transformers import {auto}, AutoTokenizer", "", *lines]) + "\n"


def _ask_once(has_template: bool) -> list[str]:
    """Lines that generate one answer."""
    asked = ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
    if has_template:
        asked = [
            'messages = [{"role": "user", "content": "Hello"}]',
            'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
        ]
    return [*asked, "output = model.generate(**inputs, max_new_tokens=100)", "print(tokenizer.decode(output[0]))"]


def _has_head(run: FoundRun) -> bool:
    """Whether the result is a model with a classification head."""
    objective = _mapping(run.recipe.get("objective"))
    return objective.get("kind") == "classification" and objective.get("readout", "head") == "head"


def _labels(run: FoundRun) -> list[str]:
    labels = _mapping(run.recipe.get("objective")).get("labels")
    return [str(label) for label in labels] if isinstance(labels, list) else []


def _label_line(run: FoundRun) -> list[str]:
    labels = _labels(run)
    return [f"# in this order: {', '.join(labels)}".replace("\n", " ")] if 0 < len(labels) <= 20 else []


def _members(run: FoundRun) -> list[str]:
    """The folders of an ensemble's members; none of a single adapter."""
    return sorted((path.name for path in (run.path / "adapter").glob("member-*")), key=lambda name: (len(name), name))


def _load_adapter(run: FoundRun, auto: str) -> tuple[list[str], list[str]]:
    """(imports, lines) that load the base as it was in training, and put the adapter on it."""
    imports = ["from peft import PeftModel"]
    if run.method in ("adapter", "adamix"):
        imports.append("import ftcli.methods.bottleneck.tuner  # makes PEFT know bottleneck adapters")
    model = _mapping(run.recipe.get("model"))
    reference = str(model.get("base"))
    lines = []
    if reference.startswith("builtin:"):
        imports.append("from ftcli.builtin.catalogue import model_folder")
        arguments = [f'model_folder("{reference.removeprefix("builtin:")}")']
    elif _is_hub_id(reference):
        arguments = [f'"{reference}"']
        arguments += [f'revision="{model["revision"]}"'] if model.get("revision") else []
    else:
        lines.append(f'folder = "{base_name(reference)}"  # where the base model is')
        arguments = ["folder"]
    if quantization := _mapping(_mapping(run.recipe.get("method")).get("quantize")):
        imports += ["import torch", "from transformers import BitsAndBytesConfig"]
        arguments.append(f"quantization_config={_bits_and_bytes(quantization)}")
    if _has_head(run):
        arguments.append(f"num_labels={max(1, len(_labels(run)))}")
    lines.append(f"base = {auto}.from_pretrained({', '.join(arguments)})")
    members = _members(run)
    place = f"adapter/{members[0]}" if members else "adapter"
    note = f"  # one of {len(members)} members; `ftcli generate` lets all of them vote" if members else ""
    lines.append(f'model = PeftModel.from_pretrained(base, "{place}"){note}')
    return imports, lines


def _bits_and_bytes(quantization: Mapping[str, Any]) -> str:
    """The expression that makes transformers load the base in the format it had in training."""
    form = quantization.get("format", "nf4")
    if form == "int8":
        return "BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)"
    dtype = quantization.get("compute_dtype", "auto")
    settings = {
        "load_in_4bit": "True",
        "bnb_4bit_quant_type": f'"{form}"',
        "bnb_4bit_use_double_quant": str(bool(quantization.get("double_quant", True))),
        "bnb_4bit_compute_dtype": f"torch.{'float32' if dtype == 'auto' else dtype}",
    }
    return f"BitsAndBytesConfig({', '.join(f'{key}={value}' for key, value in settings.items())})"


def _front_matter(run: FoundRun) -> str:
    """The metadata the Hub reads. A base is named only where the Hub can know it; a license only if the run knows one."""
    import yaml

    model = _mapping(run.recipe.get("model"))
    metadata: dict[str, Any] = {}
    if _is_hub_id(str(model.get("base"))):
        metadata["base_model"] = model["base"]
        metadata["base_model_relation"] = "adapter" if run.artefact == "adapter" else "finetune"
    if run.manifest.get("license"):
        metadata["license"] = str(run.manifest["license"])
    metadata["library_name"] = "peft" if run.artefact == "adapter" else "transformers"
    metadata["pipeline_tag"] = (
        "text-classification" if _mapping(run.recipe.get("objective")).get("kind") == "classification" else "text-generation"
    )
    method, objective = _mapping(run.recipe.get("method")).get("kind"), _mapping(run.recipe.get("objective")).get("kind")
    metadata["tags"] = ["ftcli", *(kind for kind in (method, objective) if isinstance(kind, str) and _PLAIN.fullmatch(kind))]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n"


def _data(run: FoundRun) -> str:
    headings = ["source", "from", "format", "examples", "tokens", "targets", "dropped rows"]
    entries = _mapping(run.recipe.get("data")).get("train")
    origins = [_origin(entry) for entry in entries] if isinstance(entries, list) else []
    rows = []
    for index, report in enumerate(report for report in run.data if report["use"] == "train"):
        counts = [report.get(key) for key in ("num_examples", "num_tokens", "num_targets")]
        dropped = sum(count for count in _mapping(report.get("dropped")).values() if isinstance(count, int))
        rows.append([report.get("name", "-"), origins[index], report.get("format", "-"), *counts, dropped])
    return table(headings, rows)


def _origin(entry: object) -> str:
    """Where a training source comes from, without the folders of this machine."""
    source = _mapping(_mapping(entry).get("source"))
    name = source.get("dataset") or source.get("name") or source.get("path")
    if name is None:
        return "-"
    return Path(str(name)).name if source.get("kind") == "file" else f"{source.get('kind')}: {name}"


def _settings(run: FoundRun) -> list[tuple[str, str]]:
    """(setting, value) of the method, the objective and the training, without what is empty."""
    parts = {"method": run.recipe.get("method"), "objective": run.recipe.get("objective")}
    train = _mapping(run.recipe.get("train"))
    parts["train"] = {key: train[key] for key in _SHOWN_SETTINGS if key in train}
    return [
        (f"{part}.{key}", _flow(value))
        for part, settings in parts.items()
        for key, value in _mapping(settings).items()
        if value not in (None, {}, [])
    ]


def _flow(value: object) -> str:
    """A value on one line, as YAML has it.

    Example:
        >>> _flow({"kind": "cosine", "warmup_ratio": 0.03}), _flow("all-linear"), _flow(True)
        ('kind: cosine, warmup_ratio: 0.03', 'all-linear', 'true')
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_flow(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(map(_flow, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _proofs(run: FoundRun) -> str:
    lines = []
    for proof in run.proofs:
        mark = "passed" if proof.get("passed") else "**failed**"
        lines.append(f"- {mark}: {inline(proof.get('name', ''))} - {inline(proof.get('detail', ''))}")
    return "\n".join(lines)


def _is_hub_id(reference: str) -> bool:
    return _HUB_ID.fullmatch(reference) is not None and not reference.startswith((".", "~"))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
