"""One base in memory, and the adapters that are put on it by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftcli.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from ftcli.exporting.source import Source
    from ftcli.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Served:
    """The models that can be asked for."""

    tokenizers: Mapping[str, Tokenizer]
    """By the name of the model; an adapter that brings a tokenizer has its own template."""
    use: Callable[[str], nn.Module]
    """What computes a model, until another one is used: for one thread alone."""

    @property
    def names(self) -> list[str]:
        """The base first, then its adapters."""
        return list(self.tokenizers)


def no_conversations(name: str, tokenizer: Tokenizer) -> str:
    """What a model without a chat template can do, and how it gets one."""
    fitting = "chatml" if tokenizer.backend.token_to_id("<|im_end|>") is not None else "plain"
    return (
        f"`{name}` has no chat template, and takes no conversations: POST /v1/completions continues plain text, and "
        f"`ftcli serve --template {fitting}` gives it a template"
    )


def serve_models(target: str, adapters: Mapping[str, str], device: str = "auto", template: str | None = None) -> Served:
    """Load a base once, and every adapter.

    Args:
        target: a base, or a run or adapter, which is then served by its name beside its base; alone, where it was trained on
            another one than any model folder holds: with new tokens, scaled positions, or quantised.
        adapters: adapter folders or runs, by the name they are asked for.
        template: for the models that have no chat template: `chatml`, `plain`, a path to a Jinja file, or the Jinja text.

    Raises:
        RequestError: there is no such model, or an adapter does not fit the base.
        UsageError: every model has a template of its own, with which it was trained.
    """
    served = _served(target, adapters, device)
    return served if template is None else _with_template(served, template)


def _with_template(served: Served, template: str) -> Served:
    from ftcli.models.tokenizer import load_tokenizer

    bare = {name: tokenizer for name, tokenizer in served.tokenizers.items() if tokenizer.chat_template is None}
    if not bare:
        raise UsageError("--template is for models that have no chat template, and all of these have one", hint="leave it out")
    made = {name: load_tokenizer(str(tokenizer.folder), template=template) for name, tokenizer in bare.items()}
    return Served({**served.tokenizers, **made}, served.use)


def _served(target: str, adapters: Mapping[str, str], device: str) -> Served:
    from ftcli.exporting.source import open_source
    from ftcli.models.added_rows import needs_another_base

    source = open_source(target, device)
    needs_own_base = source.adapter is not None and needs_another_base(source.adapter) is not None
    is_plain = source.quantization is None and source.base is not None and not needs_own_base
    if source.adapter is not None and is_plain:
        assert source.base is not None
        return _with_adapters(source, source.base, {source.name: target, **adapters}, device)
    if source.holds_model and is_plain:
        return _with_adapters(source, target, adapters, device)
    if adapters:
        raise UsageError(f"`{target}` is served alone, and cannot carry adapters: {source.description}", hint="name the base itself")
    module = source.attached()
    return Served({source.name: source.tokenizer}, lambda name: module)


def _with_adapters(source: Source, base: str, adapters: Mapping[str, str], device: str) -> Served:
    from ftcli.exporting.open_target import open_adapters
    from ftcli.models.adapters import BASE

    base_name = source.name if source.adapter is None else base.removeprefix("builtin:").rstrip("/").rpartition("/")[2]
    if base_name in adapters:
        raise UsageError(f"`{base_name}` is the name of the base: the adapter needs another", hint="--adapter NAME=DIR")
    loaded = open_adapters(base, adapters, device=device)
    tokenizers = {base_name: loaded.tokenizer, **{name: _tokenizer(folder, loaded.tokenizer) for name, folder in adapters.items()}}
    return Served(tokenizers, lambda name: loaded.adapters.use(BASE if name == base_name else name))


def _tokenizer(folder: str, of_base: Tokenizer) -> Tokenizer:
    """The tokenizer that was saved with an adapter, with the template it was trained with, or the base's."""
    from ftcli.models.tokenizer import load_tokenizer

    path = Path(folder).expanduser()
    place = next((place for place in (path / "adapter", path) if (place / "tokenizer.json").is_file()), None)
    return of_base if place is None else load_tokenizer(str(place))
