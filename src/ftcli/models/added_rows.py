"""Rows for new tokens in embedding and head: where they start, how they train alone, and how an adapter carries them.

Where only the new rows train, they are a parameter of their own, in float32, that takes the place of the frozen rows by a hook on the
embedding and one on the head: no gradient, optimizer state or checkpoint of the whole vocabulary is needed, and old rows cannot move.
Legend: ``V`` vocabulary, ``K`` new tokens, ``D`` hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftcli.errors import Problem, RequestError
from ftcli.models.changes import Change, largest_difference, note_change, probe_logits
from ftcli.models.fingerprint import noted_rope

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ftcli.models.settings import Model
    from ftcli.models.tokenizer import Tokenizer

ROWS_FILE = "added_tokens.safetensors"
TOKEN_ADAPTER = "token_adapter"
"""In the names of the tensors in which PEFT keeps rows of single tokens."""
_PEFT_CONFIG, _PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_IN_ADAPTER = "in_adapter"
_FIRST, _ROWS = "ftcli_first_added", "ftcli_added_rows"
_PARAMETER = "added_rows"
Part = Literal["embedding", "head"]


# ---- the start ---------------------------------------------------------------------------------------------------------------


def add_rows(model: PreTrainedModel, spec: Model, tokenizer: Tokenizer) -> None:
    """Give the new tokens of `tokenizer` rows in embedding and head, and note that old tokens' logits are what they were.

    Args:
        spec: the model of the recipe, with `add_tokens`.

    Raises:
        RequestError: the logits of old tokens changed.
    """
    import torch

    assert spec.add_tokens is not None
    settings = spec.add_tokens
    base = spec.model_copy(update={"add_tokens": None}).load_tokenizer()
    texts, first = settings.known(), base.vocab_size
    before = probe_logits(model, first)
    _make_room(model, first + len(texts))
    described = {settings.text(token): text for token, text in settings.descriptions.items()}
    pieces: list[list[int] | None] = []
    for text in texts:
        is_mean = settings.start == "mean" and text not in described
        pieces.append(None if is_mean else base.encode(described.get(text, text))[0])
    with torch.no_grad():
        for _, module in _parts(model):
            for weight in (module.weight, getattr(module, "bias", None)):
                if weight is not None:
                    _fill(weight, first, pieces)
    model.ftcli_first_added = first  # type: ignore[assignment]  # modules take tensors and modules by their types
    difference = _difference(model, before, first)
    how = "the mean of all tokens" if settings.start == "mean" else "the mean of their pieces"
    detail = f"{len(texts)} new tokens, {first} to {first + len(texts) - 1}, begin at {how}; "
    note_change(model, Change("new tokens", f"{detail}logits of old tokens unchanged: largest difference {difference:.1e}"))


def _difference(model: PreTrainedModel, before: Tensor, first: int) -> float:
    after = probe_logits(model, first)
    if model.get_output_embeddings() is not None:
        before, after = before[..., :first], after[..., :first]
    difference, scale = largest_difference(before, after)
    if difference > 1e-4 * scale and str(model.dtype) == "torch.float32":
        raise RequestError("tokens cannot be added", [Problem("model.add_tokens", f"logits of old tokens change by {difference:.1e}")])
    return difference


def _fill(weight: Tensor, first: int, pieces: list[list[int] | None]) -> None:
    mean = weight[:first].float().mean(dim=0)
    for index, own in enumerate(pieces):
        weight[first + index] = (mean if not own else weight[own].float().mean(dim=0)).to(weight.dtype)


def _make_room(model: PreTrainedModel, num_rows: int) -> None:
    """At least so many rows; a base with unused rows behind its vocabulary has them already."""
    import torch

    embedding: Any = model.get_input_embeddings()
    if len(embedding.weight) < num_rows:
        with torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(num_rows, mean_resizing=False)


def _parts(model: PreTrainedModel) -> list[tuple[Part, Any]]:
    """Embedding and head; the embedding alone where the head is the same weight or there is none."""
    embedding, head = _plain(model.get_input_embeddings()), _plain(model.get_output_embeddings())
    found: list[tuple[Part, Any]] = [("embedding", embedding)]
    if head is not None and head.weight is not embedding.weight:
        found.append(("head", head))
    return found


def _plain(module: Any) -> Any:
    """The module under what PEFT has put around it."""
    while hasattr(module, "base_layer") or hasattr(module, "original_module"):
        module = module.base_layer if hasattr(module, "base_layer") else module.original_module
    return module


# ---- training ----------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _TrainedRows:
    """The new rows of a model as parameters of their own."""

    first: int
    owners: list[Any]
    """Embedding and head, or the one weight that is both."""
    handles: list[Any] = field(default_factory=list)


def let_rows_train(module: nn.Module, spec: Model, artefact: str) -> None:
    """Mark what `model.add_tokens.train` says as trained, beside what the method trains.

    Args:
        module: what the method's `attach` gave.
        artefact: of the method; an adapter keeps whole matrices in float32 only.

    Raises:
        RequestError: whole matrices of another dtype would train beside an adapter.
    """
    import torch
    from torch import nn

    from ftcli.layout.model import inner_model

    model = inner_model(module)
    is_whole_copied = all(_is_copied(model, part) for _, part in _parts(model))
    if spec.add_tokens is not None and artefact == "adapter" and not is_whole_copied and not _is_known_to_peft(module, spec):
        detail = "only ftcli puts them on the base beside this adapter: PEFT alone would load another model; elsewhere: `ftcli merge`"
        note_change(model, Change("new tokens elsewhere", detail))
    if spec.add_tokens is None or spec.add_tokens.train == "none":
        return
    parts = [part for _, part in _parts(model) if not part.weight.requires_grad and not _is_copied(model, part)]
    if spec.add_tokens.train == "all":
        if artefact == "adapter" and any(part.weight.dtype != torch.float32 for part in parts):
            hint = "`train: rows`, or model.dtype: float32"
            raise RequestError("new tokens", [Problem("model.add_tokens.train", "`all` beside an adapter trains float32 weights", hint)])
        for part in parts:
            part.weight.requires_grad_(True)
        return
    first, count = int(model.ftcli_first_added), len(spec.add_tokens.known())  # type: ignore[arg-type]
    rows = _TrainedRows(first, parts)
    for part in parts:
        part.register_parameter(_PARAMETER, nn.Parameter(part.weight[first : first + count].detach().float().clone()))
    embedding, head = _plain(model.get_input_embeddings()), _plain(model.get_output_embeddings())
    if embedding in parts:
        rows.handles.append(embedding.register_forward_hook(_embedding_hook(first)))
    owner = head if head in parts else embedding
    if head is not None and owner in parts and owner.weight is head.weight:
        rows.handles.append(head.register_forward_hook(_head_hook(owner, first)))
    setattr(model, _ROWS, rows)


def _is_copied(model: PreTrainedModel, part: Any) -> bool:
    """Does the method train a copy of this module in full?"""
    return any(getattr(module, "original_module", None) is part for module in model.modules())


def _embedding_hook(first: int) -> Callable[[Any, tuple[Any, ...], Any], Any]:
    def hook(module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        import torch

        rows = module.added_rows
        is_new = inputs[0] >= first
        new = torch.nn.functional.embedding((inputs[0] - first).clamp(0, len(rows) - 1), rows)
        scale = getattr(module, "embed_scale", None)  # of the Gemma family
        new = new.to(output.dtype) if scale is None else new.to(output.dtype) * scale.to(output.dtype)
        return torch.where(is_new[..., None], new, output)

    return hook


def _head_hook(owner: Any, first: int) -> Callable[[Any, tuple[Any, ...], Any], Any]:
    def hook(module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        import torch

        rows, last = owner.added_rows, first + len(owner.added_rows)
        bias = None if getattr(module, "bias", None) is None else module.bias[first:last].to(inputs[0].dtype)
        new = torch.nn.functional.linear(inputs[0], rows.to(inputs[0].dtype), bias)
        return torch.cat([output[..., :first], new.to(output.dtype), output[..., last:]], dim=-1)

    return hook


def fold_rows(module: nn.Module) -> None:
    """Put the trained rows into the weights they belong to, for good."""
    from ftcli.layout.model import inner_model

    model = inner_model(module)
    rows: _TrainedRows | None = getattr(model, _ROWS, None)
    if rows is None:
        return
    for handle in rows.handles:
        handle.remove()
    for owner in rows.owners:
        own = owner.added_rows
        owner.weight.data[rows.first : rows.first + len(own)] = own.data.to(owner.weight.dtype)
        del owner.added_rows
    delattr(model, _ROWS)


@contextmanager
def rows_in_place(module: nn.Module) -> Iterator[None]:
    """Inside, the trained rows stand in the weights as in an ordinary model; afterwards all is as it was."""
    from ftcli.layout.model import inner_model

    model = inner_model(module)
    rows: _TrainedRows | None = getattr(model, _ROWS, None)
    if rows is None:
        yield
        return
    kept = []
    for owner in rows.owners:
        own = owner._parameters.pop(_PARAMETER)
        target = owner.weight.data[rows.first : rows.first + len(own)]
        kept.append((owner, own, target.clone()))
        target.copy_(own.data.to(target.dtype))
    try:
        yield
    finally:
        for owner, own, before in kept:
            owner.weight.data[rows.first : rows.first + len(own)] = before
            owner._parameters[_PARAMETER] = own


# ---- beside an adapter -------------------------------------------------------------------------------------------------------


def write_rows(module: nn.Module, spec: Model, folder: Path) -> None:
    """Leave the rows of new tokens (or the whole matrices, where these trained) beside an adapter; call it inside `rows_in_place`.

    PEFT alone loads them from a LoRA adapter, on a base with room for them, which `AutoPeftModelForCausalLM` makes by the tokenizer
    in the folder.
    """
    from safetensors.torch import save_file

    from ftcli.layout.model import inner_model

    if spec.add_tokens is None:
        return
    model: Any = inner_model(module)
    first, count = int(model.ftcli_first_added), len(spec.add_tokens.known())
    is_whole = spec.add_tokens.train == "all"
    tensors: dict[str, Tensor] = {}
    for name, part in _parts(model):
        weight = part.weight.detach()
        kept = weight if is_whole else weight[first : first + count]
        tensors[name] = kept.cpu().clone().contiguous()
    facts = {"format": "pt", "first": json.dumps(first), "count": json.dumps(count)}
    if _is_known_to_peft(module, spec):
        if is_whole:
            facts[_IN_ADAPTER] = json.dumps(_write_whole(model, folder, tensors))
            tensors = {}
        else:
            _write_for_peft(model, folder, list(range(first, first + count)), tensors)
    save_file(tensors, folder / ROWS_FILE, facts)


def _is_known_to_peft(module: nn.Module, spec: Model) -> bool:
    """Has PEFT itself a place for what `write_rows` writes?"""
    from ftcli.layout.model import inner_model

    model: Any = inner_model(module)
    configs = getattr(module, "peft_config", {})
    is_lora = any(getattr(config, "peft_type", None) == "LORA" for config in configs.values())
    if not is_lora or any(_is_copied(model, part) for _, part in _parts(model)):
        return False
    wanted = (model.get_input_embeddings(), model.get_output_embeddings())
    # PEFT does not train a module in full that has an adapter.
    return spec.add_tokens is not None and (spec.add_tokens.train != "all" or all(_plain(module) is module for module in wanted))


def _write_for_peft(model: Any, folder: Path, ids: list[int], tensors: dict[str, Tensor]) -> None:
    """The same rows as PEFT keeps those of single tokens."""
    names = _names(model)
    own = {f"base_model.model.{names[part]}.{TOKEN_ADAPTER}.trainable_tokens_delta": rows.clone() for part, rows in tensors.items()}
    _add_to_adapter(folder, {"trainable_token_indices": {names[part].rpartition(".")[2]: ids for part in tensors}}, own)


def _write_whole(model: Any, folder: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Embedding and head as PEFT keeps modules that are trained in full; gives the name of each one's tensor in the adapter's file.

    A head that is the embedding's weight is written, too: PEFT would leave it at the base's.
    """
    names = _names(model)
    found = {part: f"base_model.model.{name}.weight" for part, name in names.items()}
    own = {found[part]: tensors.get(part, tensors["embedding"]).clone() for part in names}
    config = json.loads((folder / _PEFT_CONFIG).read_text(encoding="utf-8"))
    saved = [*(config.get("modules_to_save") or ()), *(name.rpartition(".")[2] for name in names.values())]
    _add_to_adapter(folder, {"modules_to_save": saved}, own)
    return found


def _names(model: Any) -> dict[str, str]:
    """Where embedding and head are in the model."""
    wanted = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    return {part: name for part, found in wanted.items() for name, module in model.named_modules() if module is found}


def _add_to_adapter(folder: Path, settings: dict[str, Any], own: dict[str, Tensor]) -> None:
    from safetensors.torch import load_file, save_file

    config_path, weights_path = folder / _PEFT_CONFIG, folder / _PEFT_WEIGHTS
    config = json.loads(config_path.read_text(encoding="utf-8")) | settings
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file({**load_file(weights_path), **own}, weights_path, {"format": "pt"})


def whole_in_adapter(folder: Path) -> dict[str, str]:
    """The tensors of an adapter's file that are embedding and head, which `read_rows` puts into the base: by what they are.

    Raises:
        RequestError: the note of them cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / ROWS_FILE
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            found: dict[str, str] = json.loads(file.metadata().get(_IN_ADAPTER, "{}"))
            return found
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise _unfit(path, f"cannot be read: {error}") from error


def read_rows(model: PreTrainedModel, folder: Path) -> None:
    """Put the rows that are kept beside an adapter into its base, which gets room for them where it has none.

    Raises:
        RequestError: they do not fit the base.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / ROWS_FILE
    if not path.is_file():
        return
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata()
            first, count = int(facts["first"]), int(facts["count"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
        if whole := whole_in_adapter(folder):
            with safe_open(folder / _PEFT_WEIGHTS, "pt") as file:
                tensors = {name: file.get_tensor(own) for name, own in whole.items()}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise _unfit(path, f"cannot be read: {error}") from error
    _make_room(model, first + count)
    parts = dict(_parts(model))
    if whole and "head" not in parts:
        tensors.pop("head", None)  # the same weight
    if parts.keys() != tensors.keys():
        raise _unfit(path, f"holds {', '.join(tensors)}, and the base has {', '.join(parts)}")
    for name, part in parts.items():
        rows = tensors[name]
        start = first if len(rows) == count else 0
        if rows.shape[1] != part.weight.shape[1] or start + len(rows) > len(part.weight):
            raise _unfit(path, f"{name} of shape {tuple(rows.shape)} for a base of {tuple(part.weight.shape)}")
        part.weight.data[start : start + len(rows)] = rows.to(part.weight.device, part.weight.dtype)


def needs_another_base(folder: Path) -> str | None:
    """What an adapter's base must have beside its own weights, in words; None for nothing."""
    if (folder / ROWS_FILE).is_file():
        return "it brings new tokens"
    return "it was trained with scaled positions" if noted_rope(folder) is not None else None


def _unfit(path: Path, what: str) -> RequestError:
    return RequestError("the adapter cannot be loaded", [Problem(str(path), what)])
