"""Base models in and out: loaded completely or not at all, and written as plain Hugging Face folders.

Transformers gives a weight that is missing in a checkpoint random values and a warning. Here every tensor of the checkpoint has
to be used and every parameter has to come from it (a tied head comes from the embedding); anything else is an error.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ftcli.errors import Problem, RequestError, did_you_mean
from ftcli.models.classifier import ClassHead, configure, fresh_modules, is_classifier, is_head_tensor, settle_pooling
from ftcli.models.locate import model_folder
from ftcli.models.quiet import quiet_libraries

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from ftcli.models.quantisation import Quantization
    from ftcli.models.settings import Model
    from ftcli.models.tokenizer import Tokenizer

HeadChoice = ClassHead | Literal["own"] | None
"""The head of a model: a fresh classification head, the one in its folder, or that of a language model."""
_LISTED = 10


def load_config(model: Model, tokenizer: Tokenizer | None = None) -> PretrainedConfig:
    """The configuration of `model`, without its weights.

    Args:
        tokenizer: where vocabulary size and special ids of an `init` come from, unless it names them itself.

    Raises:
        RequestError: no such architecture or field, or a folder without a readable configuration.
    """
    if model.init is not None:
        return _scaled(_initial_config(model.init.architecture, model.init.config, tokenizer), model)
    folder = _folder(model, weights=False)
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except _reading_errors() as error:
        raise _unreadable(model, "its configuration", error) from error
    return _scaled(config, model)


def _reading_errors() -> tuple[type[Exception], ...]:
    """What transformers raises for files that make no model: values of its configuration, or weights."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, StrictDataclassError, SafetensorError


def _scaled(config: PretrainedConfig, model: Model) -> PretrainedConfig:
    """`config` with the positions that the recipe asks for, and a note of it for `load_model`."""
    if model.rope is not None:
        config.ftcli_rope = model.rope.apply(config)
    return config


def checkpoint_dtype(folder: Path) -> str:
    """Torch's name of the dtype a model folder's configuration states; float32 where it states none."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(fields.get("dtype") or fields.get("torch_dtype") or "float32")


def load_model(
    model: Model,
    tokenizer: Tokenizer | None,
    *,
    quantization: Quantization | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    seed: int = 0,
    head: HeadChoice = None,
) -> PreTrainedModel:
    """The base model on `device`, in evaluation mode, complete.

    Args:
        tokenizer: its tokens must all have a row in the embedding; None for no such check.
        quantization: how linear weights are stored; None keeps them as they are.
        dtype: of the weights that are not quantised; `auto` is float32 on CPU and beside quantised weights, else the model's own.
        seed: of the random weights of an `init` and of a fresh head.
        head: a classification head instead of the language model's.

    Raises:
        RequestError: weights are missing, left over, of other shapes or unreadable; or the tokenizer has more tokens than the model.
    """
    from ftcli.models.grow.growth import find_grown
    from ftcli.models.quantisation import check_support

    if quantization is not None:
        check_support(quantization, str(device))
    target = _torch_dtype(dtype, str(device), quantization)
    with quiet_libraries():
        if model.init is None:
            with _seeded(seed):
                folder = _folder(model)
                loaded = _from_folder(folder, model, quantization, target, device, head, _pad_id(tokenizer))
            find_grown(loaded, folder)
            loaded.config._name_or_path = cast(str, model.base)
        else:
            loaded = _from_init(model, tokenizer, quantization, target, device, seed, head)
    loaded.eval()
    settle_tying(loaded)
    if model.add_tokens is not None and tokenizer is not None and model.add_tokens.known():
        from ftcli.models.added_rows import add_rows

        add_rows(loaded, model, tokenizer)
    _check_embedding(loaded, tokenizer)
    _settle_generation(loaded)
    return _changed(loaded, model, seed)


def _changed(loaded: PreTrainedModel, model: Model, seed: int) -> PreTrainedModel:
    """The base as the recipe wants it before training, with notes of what was done."""
    from ftcli.models.changes import Change, note_change
    from ftcli.models.grow.growth import grow

    if model.rope is not None:
        note_change(loaded, Change("positions", loaded.config.__dict__.pop("ftcli_rope")))
    with quiet_libraries():
        return loaded if model.grow is None else grow(loaded, model.grow, seed)


def load_weights(folder: Path, *, like: PreTrainedModel) -> PreTrainedModel:
    """The model saved in `folder`, complete, with device, dtype and attention of `like`.

    Raises:
        RequestError: as `load_model`.
    """
    from ftcli.models.settings import Model

    spec = Model(base=str(folder), attention="eager" if like.config._attn_implementation == "eager" else "auto")
    with quiet_libraries():
        loaded = _from_folder(Path(folder), spec, None, like.dtype, like.device, "own" if is_classifier(like) else None)
    loaded.eval()
    return loaded


def save_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a plain Hugging Face folder: safetensors, configurations, tokenizer files."""
    save_weights(model, folder)
    tokenizer.save(folder)


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write weights (safetensors, in the dtype they have), config.json and generation_config.json, and what of them was grown."""
    from ftcli.models.grow.growth import note_grown

    with quiet_libraries():
        as_pretrained(model).save_pretrained(folder)
    note_grown(model, folder)


def as_pretrained(module: nn.Module) -> PreTrainedModel:
    """The transformers model that `module` is."""
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        raise TypeError(f"expected a transformers model, found {type(module).__name__}")
    return module


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random weights inside depend on `seed` alone, and leave no trace."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _pad_id(tokenizer: Tokenizer | None) -> int | None:
    """What fills rows: the padding token, or the end token where there is none."""
    if tokenizer is None:
        return None
    return tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id


def _model_class(head: HeadChoice) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if head is None else AutoModelForSequenceClassification


def _from_folder(
    folder: Path,
    model: Model,
    quantization: Quantization | None,
    dtype: torch.dtype | str,
    device: str | torch.device,
    head: HeadChoice = None,
    pad_id: int | None = None,
) -> PreTrainedModel:
    from transformers import AutoConfig

    from ftcli.models.quantisation import loading_arguments, settle

    _check_files(folder, model)
    arguments: dict[str, Any] = {"dtype": dtype, "attn_implementation": _attention(model), "device_map": {"": str(device)}}
    if quantization is not None:
        arguments |= loading_arguments(quantization, str(device))
        if head is not None:
            # A head that trains cannot be quantised.
            arguments["quantization_config"].llm_int8_skip_modules = ["score", "classifier", "pooler", "head"]
    try:
        if isinstance(head, ClassHead) or model.rope is not None:
            arguments["config"] = _scaled(AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code), model)
        if isinstance(head, ClassHead):
            configure(arguments["config"], head, pad_id)
        result: Any = _model_class(head).from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
            **arguments,
        )
    except _reading_errors() as error:
        raise _unreadable(model, "its weights", error) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise _unreadable(model, "its weights", error) from error
    loaded: PreTrainedModel = result[0]
    info = _without_head(result[1], loaded) if isinstance(head, ClassHead) else result[1]
    _check_complete(model, info)
    if quantization is not None:
        settle(loaded, quantization, str(device))
    return loaded


def _without_head(info: dict[str, Any], loaded: PreTrainedModel) -> dict[str, Any]:
    """What is missing and left over of the base alone: a fresh head is in no checkpoint, and the language model's goes."""
    settle_pooling(loaded)
    loaded.fresh_modules = fresh_modules(sorted(map(str, info.get("missing_keys", ()))), loaded)  # type: ignore[assignment]
    kinds = ("missing_keys", "unexpected_keys")
    return {**info, **{kind: [name for name in info.get(kind, ()) if not is_head_tensor(str(name), type(loaded))] for kind in kinds}}


def _from_init(
    model: Model,
    tokenizer: Tokenizer | None,
    quantization: Quantization | None,
    dtype: torch.dtype | str,
    device: str | torch.device,
    seed: int,
    head: HeadChoice = None,
) -> PreTrainedModel:
    """Random weights that depend on `seed` alone; quantised by the way every base goes, through a folder."""
    import torch

    config = load_config(model, tokenizer)
    if isinstance(head, ClassHead):
        configure(config, head, _pad_id(tokenizer))
    plain = torch.float32 if dtype == "auto" else dtype
    with _seeded(seed):
        try:
            fresh = _model_class(head).from_config(config, attn_implementation=_attention(model), dtype=plain)
        except (ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
            raise RequestError("no model can be made", [Problem("model.init.config", _brief(error))]) from error
    if isinstance(head, ClassHead):
        settle_pooling(fresh)
    if quantization is None:
        return cast("PreTrainedModel", fresh.to(device))
    with tempfile.TemporaryDirectory() as folder:
        fresh.save_pretrained(folder)
        loaded = _from_folder(Path(folder), model, quantization, plain, device, "own" if head is not None else None)
    loaded.config._name_or_path = ""
    return loaded


def _initial_config(architecture: str, fields: dict[str, Any], tokenizer: Tokenizer | None) -> PretrainedConfig:
    import dataclasses

    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    allowed = list(dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES]))
    if architecture not in allowed:
        hint = did_you_mean(architecture, allowed) or "llama, qwen3, gpt2, ..."
        problem = Problem("model.init.architecture", f"`{architecture}` is not a causal language model or classifier of transformers", hint)
        raise RequestError("no model can be made", [problem])
    config_class = CONFIG_MAPPING[architecture]
    known = [field.name for field in dataclasses.fields(config_class)] + list(config_class.attribute_map)
    unknown = [
        Problem(f"model.init.config.{name}", f"`{architecture}` has no such field", did_you_mean(name, known))
        for name in fields
        if name not in known
    ]
    if unknown:
        raise RequestError("no model can be made", unknown)
    try:
        return config_class(**{**_tokenizer_fields(tokenizer), **fields})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise RequestError("no model can be made", [Problem("model.init.config", _brief(error))]) from error


def _tokenizer_fields(tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    return {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def _torch_dtype(dtype: str | torch.dtype, device: str, quantization: Quantization | None) -> torch.dtype | str:
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.startswith("cpu") or quantization is not None else "auto"
    return cast(torch.dtype, getattr(torch, dtype))


def _attention(model: Model) -> str | None:
    """None lets transformers take sdpa where the architecture has it, else eager."""
    return None if model.attention == "auto" else model.attention


def _folder(model: Model, weights: bool = True) -> Path:
    if model.base is None:
        raise RequestError("no model", [Problem("model", "neither `base` nor `init` is given", "model: {base: builtin:tiny}")])
    return model_folder(model.base, model.revision, weights=weights)


def _check_files(folder: Path, model: Model) -> None:
    if any(folder.glob("*.safetensors")) and (folder / "config.json").is_file():
        return
    where = f"model.base: {model.base}"
    if (folder / "adapter_config.json").is_file():
        problem = Problem(where, "is an adapter, not a model", "merge it into its base first: ftcli merge --base BASE --adapter DIR -o OUT")
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        problem = Problem(where, "has its weights in pickle files, which can run code", "use a revision with safetensors")
    else:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:_LISTED]) or "nothing"
        problem = Problem(where, f"no config.json with *.safetensors in {folder} (found: {found})")
    raise RequestError("the base model cannot be loaded", [problem])


def _check_complete(model: Model, info: dict[str, Any]) -> None:
    """Refuse a model of which a part would be random, or a checkpoint of which a part would be dropped."""
    kinds = {
        "missing_keys": "parameters are not in the checkpoint",
        "unexpected_keys": "tensors of the checkpoint have no place in the model",
        "mismatched_keys": "tensors have another shape than the model",
    }
    problems = [
        Problem(f"model.base: {model.base}", f"{len(info[kind])} {what}: {_listed(sorted(map(str, info[kind])))}")
        for kind, what in kinds.items()
        if info.get(kind)
    ]
    if problems:
        raise RequestError("the base model is not complete", problems)


def _check_embedding(model: PreTrainedModel, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        return
    embedding: Any = model.get_input_embeddings()
    num_rows = int(embedding.weight.shape[0])
    if tokenizer.vocab_size > num_rows:
        what = f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding of the model {num_rows} rows"
        hint = "leave `model.tokenizer` out to use the model's own tokenizer, or leave tokens out of it"
        raise RequestError("model and tokenizer do not fit", [Problem("model.tokenizer", what, hint)])


def settle_tying(model: PreTrainedModel) -> None:
    """Let the configuration say what is: a checkpoint with an own head stays untied, and so must its copy."""
    head = model.get_output_embeddings()
    if head is None or not getattr(model.config, "tie_word_embeddings", False):
        return
    if getattr(head, "weight", None) is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False


def _settle_generation(model: PreTrainedModel) -> None:
    """Make the generation settings savable: transformers refuses to write sampling values without `do_sample`."""
    from transformers import GenerationConfig

    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True
        try:
            settings.validate(strict=True)
        except ValueError:
            model.generation_config = GenerationConfig.from_model_config(model.config)


def _unreadable(model: Model, what: str, error: BaseException) -> RequestError:
    return RequestError("the base model cannot be loaded", [Problem(f"model.base: {model.base}", f"{what}: {_brief(error)}")])


def _brief(error: BaseException) -> str:
    """The first sentences of the first two lines of a library's error: the first line often only announces the second."""
    lines = [line.strip().partition(". ")[0] for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def _listed(names: list[str]) -> str:
    more = f", ... and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
