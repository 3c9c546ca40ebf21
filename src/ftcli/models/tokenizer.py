"""The tokenizer of a model and its chat template, without torch and transformers.

It reads what a Hugging Face folder holds (tokenizer.json, tokenizer_config.json, chat_template.jinja, ...) and gives the ids and
the rendered text that transformers' `AutoTokenizer` gives.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import DataError, Problem, RequestError, did_you_mean
from ftcli.models.locate import model_folder

if TYPE_CHECKING:
    import tokenizers

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
# Everything that AutoTokenizer may read from a folder; a saved model carries all of it on.
TOKENIZER_FILES = (
    "tokenizer.json",
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    TEMPLATE_FILE,
    "chat_template.json",
)
_SLOW_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back, and conversations to text."""

    backend: tokenizers.Tokenizer
    folder: Path
    """Where its files are."""
    special: Mapping[str, str]
    """Special tokens by name: bos_token, eos_token, pad_token, unk_token, ..."""
    templates: Mapping[str, str]
    """Chat templates by name; `default`, and sometimes `tool_use`."""
    adds_bos: bool
    """A text gets a BOS in front unless told otherwise."""
    generation_eos: tuple[int, ...]
    """Ids at which the model's generation configuration stops."""
    fingerprint: str
    """sha256 over the tokenizer's files and the templates."""

    @property
    def chat_template(self) -> str | None:
        return self.templates.get("default")

    @property
    def bos_token(self) -> str | None:
        return self.special.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.special.get("pad_token")

    @property
    def bos_id(self) -> int | None:
        return self._id(self.bos_token)

    @property
    def eos_id(self) -> int | None:
        return self._id(self.eos_token)

    @property
    def pad_id(self) -> int | None:
        return self._id(self.pad_token)

    def _id(self, token: str | None) -> int | None:
        found: int | None = None if token is None else self.backend.token_to_id(token)
        return found

    @functools.cached_property
    def vocab_size(self) -> int:
        """Ids it can produce, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def added_texts(self) -> tuple[str, ...]:
        """Texts that are cut out as one token wherever they stand, longest first."""
        return tuple(sorted((token.content for token in self.backend.get_added_tokens_decoder().values()), key=len, reverse=True))

    @functools.cached_property
    def end_of_turn(self) -> str | None:
        """The text with which the template ends an assistant turn; None without a template or when it writes none."""
        from ftcli.data.template import end_of_turn

        return end_of_turn(self)

    @functools.cached_property
    def end_texts(self) -> tuple[str, ...]:
        """Texts that end an answer: the template's end of turn, EOS, and what generation stops at; longest first."""
        stops = [self.end_of_turn, self.eos_token, *map(self.backend.id_to_token, self.generation_eos)]
        return tuple(sorted({text for text in stops if text}, key=lambda text: (-len(text), text)))

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops: EOS, the end-of-turn token, and those of the generation configuration."""
        ids = [self.eos_id, self._id(self.end_of_turn), *self.generation_eos]
        return tuple(sorted({token for token in ids if token is not None}))

    def end_of_text(self) -> str:
        """The text of EOS, to put behind a text.

        Raises:
            RequestError: there is no EOS token.
        """
        if self.eos_token is None:
            what = f"`{self.folder}` names no `eos_token`, so a text cannot be ended"
            raise RequestError("the tokenizer has no EOS token", [Problem("model", what, "set `append_eos: false` in the format")])
        return self.eos_token

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text, as transformers' `apply_chat_template` writes it.

        Raises:
            RequestError: there is no template.
            DataError: the template refuses the conversation.
        """
        from ftcli.models.jinja import render_template

        template = self.templates.get("tool_use") if tools is not None else None
        template = template or self.chat_template
        if template is None:
            raise self.no_template()
        return render_template(template, messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, **self.special)

    def no_template(self) -> RequestError:
        """The error for a conversation where there is no chat template."""
        name = "chatml" if self.backend.token_to_id("<|im_end|>") is not None else "plain"
        hint = f"`model.template: {name}` uses a template of ftcli; a path to a Jinja file works, too"
        return RequestError("the tokenizer has no chat template", [Problem("model", f"`{self.folder}` has no chat template", hint)])

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, character offsets) of `text`; special tokens in the text are recognised, none is added.

        Raises:
            DataError: the text holds half of a surrogate pair, which JSON can write and which is no character.
        """
        encoding = self.encoding(text)
        return encoding.ids, encoding.offsets

    def encoding(self, text: str) -> tokenizers.Encoding:
        """What `encode` takes its results from, where not all of them are needed: to list offsets takes long.

        Raises:
            DataError: as `encode`.
        """
        try:
            encoding: tokenizers.Encoding = self.backend.encode(text, add_special_tokens=False)
        except TypeError as error:  # all that the library says of such a text
            half = next((letter for letter in text if "\ud800" <= letter <= "\udfff"), None)
            if half is None:
                raise
            what = f"holds half of a character: {half!r} is a lone surrogate"
            raise DataError("a text is no Unicode", [Problem("", what, "write the character whole, and files in UTF-8")]) from error
        return encoding

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """`encode` for many texts at once, on several threads."""
        return [(encoding.ids, encoding.offsets) for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def save(self, folder: Path) -> None:
        """Write the files from which transformers loads this very tokenizer and its templates."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
        _save_templates(folder, self.templates)


def load_tokenizer(reference: str, *, revision: str | None = None, template: str | None = None) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        reference: builtin:NAME, a local folder, or a hub id.
        revision: branch, tag or commit of a hub id.
        template: another chat template than the model's own: `chatml`, `plain`, a path to a Jinja file, or the Jinja text.

    Raises:
        RequestError: there is no tokenizer, or its files or the template cannot be read.
    """
    folder = model_folder(reference, revision, weights=False)
    config = _read_json(folder / CONFIG_FILE)
    backend = _read_backend(folder, config)
    special = _special_tokens(folder, config, backend)
    adds_bos = _adds_bos(config, backend, special.get("bos_token"))
    # A post-processor only adds special tokens, which `encode` never wants, and may trim spaces off the offsets, which must
    # cover every character.
    backend.post_processor = None
    templates = _own_templates(folder, config)
    if template is not None:
        templates = {"default": _chosen_template(template, backend, adds_bos, special)}
    for text in templates.values():
        _check_template(text)
    return Tokenizer(
        backend=backend,
        folder=folder,
        special=special,
        templates=templates,
        adds_bos=adds_bos,
        generation_eos=_generation_eos(folder, backend),
        fingerprint=_fingerprint(folder, templates, special),
    )


def differences_from_transformers(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """The texts to which transformers' AutoTokenizer gives other ids; imports transformers."""
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tokenizer.folder)
    return [text for text in texts if other(text, add_special_tokens=False)["input_ids"] != tokenizer.encode(text)[0]]


def _check_template(template: str) -> None:
    from ftcli.models.jinja import compile_template

    compile_template(template)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError("a tokenizer file cannot be read", [Problem(str(path), f"is not valid JSON: {error}")]) from error
    if not isinstance(content, dict):
        raise RequestError("a tokenizer file cannot be read", [Problem(str(path), "is not a JSON object")])
    return content


def _read_backend(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        path = convert_slow(folder)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises the bare class for every fault of the file, so nothing narrower can be caught.
        raise RequestError("a tokenizer file cannot be read", [Problem(str(path), str(error))]) from error
    backend.no_truncation()
    backend.no_padding()
    if str(config.get("tokenizer_class", "")).removesuffix("Fast") == "LlamaTokenizer":
        _follow_llama_class(backend, config)
    _add_configured_tokens(backend, config)
    return backend


def _follow_llama_class(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Cut text as transformers' LlamaTokenizer does, which reads only the vocabulary and the merges of tokenizer.json.

    It marks a space with Metaspace, and puts one in front of the first word only (unless `legacy`), where files of older
    versions put one after every special token. A byte-level tokenizer.json under that class name is taken as it is.
    """
    from tokenizers import decoders, pre_tokenizers

    if "ByteLevel" in repr(backend.pre_tokenizer) or not hasattr(backend.model, "byte_fallback"):
        return
    prefix = config.get("add_prefix_space")
    adds_space = prefix is None or bool(prefix)
    scheme = ("always" if config.get("legacy", False) else "first") if adds_space else "never"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if adds_space else steps)


def _add_configured_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens that tokenizer_config.json names and tokenizer.json lacks, in the order of their ids."""
    from tokenizers import AddedToken

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for _, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        if token["content"] not in known:
            flags = {name: bool(token.get(name, False)) for name in ("lstrip", "rstrip", "normalized", "single_word", "special")}
            backend.add_tokens([AddedToken(token["content"], **flags)])


def convert_slow(folder: Path) -> Path:
    """tokenizer.json made, once, from the older files of a folder that has none."""
    found = [name for name in _SLOW_FILES if (folder / name).is_file()]
    if not found:
        files = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "none"
        hint = "name a model folder that has a tokenizer, or set `model.tokenizer`"
        raise RequestError("there is no tokenizer", [Problem(str(folder), f"has no tokenizer.json (files: {files})", hint)])
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
    converted = cache_folder() / "tokenizers" / digest.hexdigest()[:32] / "tokenizer.json"
    if not converted.is_file():
        from transformers import AutoTokenizer

        try:
            backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
        except (ImportError, ValueError, OSError, AttributeError, TypeError, KeyError) as error:
            hint = "convert it with the library it was made with, or set `model.tokenizer` to a folder with tokenizer.json"
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            what = f"has no tokenizer.json, and `{found[0]}` cannot be converted: {reason}"
            raise RequestError("the tokenizer cannot be read", [Problem(str(folder), what, hint)]) from error
        converted.parent.mkdir(parents=True, exist_ok=True)
        partial = converted.with_suffix(f".{os.getpid()}")
        partial.write_text(backend.to_str(), encoding="utf-8")
        partial.replace(converted)
    return converted


def cache_folder() -> Path:
    """Where converted and extended tokenizers are kept."""
    return Path(os.environ.get("FTCLI_CACHE") or "~/.cache/ftcli").expanduser()


def _token_text(value: Any) -> str | None:
    """The text of a special token, which files give as a string or as an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_tokens(folder: Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer) -> dict[str, str]:
    """Special tokens by name, from the files; BOS and EOS from the ids in the model's configuration where no file names them."""
    special: dict[str, str] = {}
    for source in (_read_json(folder / "special_tokens_map.json"), config):
        special |= {name: text for name, value in source.items() if name.endswith("_token") and (text := _token_text(value)) is not None}
    for name in ("bos_token", "eos_token"):
        if name not in special and name not in config:
            ids = _token_ids(folder, f"{name}_id")
            text = backend.id_to_token(ids[0]) if ids else None
            special |= {name: text} if text is not None else {}
    return special


def _token_ids(folder: Path, key: str) -> tuple[int, ...]:
    """The ids that generation_config.json, or else config.json, gives under `key`, as one number or a list."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get(key)
        ids = value if isinstance(value, list) else [value]
        if ids and all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            return tuple(ids)
    return ()


def _generation_eos(folder: Path, backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    return tuple(token for token in _token_ids(folder, "eos_token_id") if backend.id_to_token(token) is not None)


def _adds_bos(config: Mapping[str, Any], backend: tokenizers.Tokenizer, bos_token: str | None) -> bool:
    """True when the tokenizer puts BOS in front of a text by default: the configuration says so, or else the post-processor does."""
    bos_id = None if bos_token is None else backend.token_to_id(bos_token)
    if bos_id is None:
        return False
    if "add_bos_token" in config:
        return bool(config["add_bos_token"])
    return list(backend.encode("a", add_special_tokens=True).ids[:1]) == [bos_id]


def _own_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates that come with the files; a file of its own goes before the entry in tokenizer_config.json."""
    found = config.get("chat_template")
    if not found:
        found = _read_json(folder / "chat_template.json").get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(found, str):
        templates["default"] = found
    elif isinstance(found, list):
        templates |= {entry["name"]: entry["template"] for entry in found}
    path = folder / TEMPLATE_FILE
    if path.is_file():
        templates = {"default": _read_text(path)}
        others = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
        templates |= {other.stem: _read_text(other) for other in others}
    return templates


def _chosen_template(template: str, backend: tokenizers.Tokenizer, adds_bos: bool, special: Mapping[str, str]) -> str:
    """The Jinja text that `model.template` means."""
    from ftcli.models.templates import NAMES, own_template

    if template in NAMES:
        has_chatml_tokens = backend.token_to_id("<|im_end|>") is not None
        if "eos_token" not in special and not (template == "chatml" and has_chatml_tokens):
            what = f"template `{template}` ends a turn with EOS, and the tokenizer has no `eos_token`"
            raise RequestError("the chat template cannot be used", [Problem("model.template", what, "give the path of a Jinja file")])
        return own_template(template, adds_bos=adds_bos, has_chatml_tokens=has_chatml_tokens)
    if "{%" in template or "{{" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        hint = did_you_mean(template, NAMES) or "a path to a Jinja file, the template itself, `chatml` or `plain`"
        raise RequestError("the chat template cannot be read", [Problem("model.template", f"there is no file `{template}`", hint)])
    return _read_text(path)


def _read_text(path: Path) -> str:
    # newline="" keeps what the file says: a template's carriage returns would be rendered
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise RequestError("the chat template cannot be read", [Problem(str(path), f"is not UTF-8 at byte {error.start}")]) from error


def _fingerprint(folder: Path, templates: Mapping[str, str], special: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps([sorted(templates.items()), sorted(special.items())]).encode())
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
    return digest.hexdigest()


def _save_templates(folder: Path, templates: Mapping[str, str]) -> None:
    """Write the templates as files of their own, and take them out of every other file that transformers would read."""
    (folder / "chat_template.json").unlink(missing_ok=True)
    path = folder / CONFIG_FILE
    config = _read_json(path)
    if config.pop("chat_template", None) is not None:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    others = folder / TEMPLATE_FOLDER
    for name, text in templates.items():
        target = folder / TEMPLATE_FILE if name == "default" else others / f"{name}.jinja"
        target.parent.mkdir(exist_ok=True)
        target.write_text(text, encoding="utf-8", newline="")
