"""A tokenizer with more tokens: a folder of its own, made once from the base's files, that transformers reads like any other."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import Problem, RequestError

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer

TOKENS_FILE = "added_tokens.txt"
"""The new tokens, one a line, in the run folder: what `model.add_tokens.file` reads."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MODEL_FILES = ("config.json", "generation_config.json")
_LISTED = 5


def extended_folder(base: Tokenizer, texts: Sequence[str], cache: Path) -> Path:
    """The folder of `base` with `texts` as tokens behind its own.

    Raises:
        RequestError: one of them is a token already, or would not be read back as it was written.
    """
    _check_new(base, texts)
    digest = hashlib.sha256(json.dumps([base.fingerprint, list(texts)]).encode()).hexdigest()[:32]
    folder = cache / "tokenizers" / f"extended-{digest}"
    if not (folder / "tokenizer.json").is_file():
        _write(base, texts, folder)
    return folder


def _write(base: Tokenizer, texts: Sequence[str], folder: Path) -> None:
    """tokenizer.json comes last, so that a folder that has it is complete."""
    from ftcli.models.tokenizer import convert_slow

    base.save(folder)
    for name in _MODEL_FILES:
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    source = folder / "tokenizer.json"
    content = json.loads((source if source.is_file() else convert_slow(base.folder)).read_text(encoding="utf-8"))
    source.unlink(missing_ok=True)
    entries = {base.vocab_size + index: text for index, text in enumerate(texts)}
    flags = dict.fromkeys(_FLAGS, False)
    content["added_tokens"] += [{"id": token, "content": text, **flags} for token, text in entries.items()]
    config_path = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    if "added_tokens_decoder" in config or config.get("tokenizer_class", "").removesuffix("Fast") == "LlamaTokenizer":
        # classes of transformers that rebuild themselves from vocabulary and merges find added tokens here only
        decoder = config.setdefault("added_tokens_decoder", {})
        decoder |= {str(token): {"content": text, **flags} for token, text in entries.items()}
        config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial = folder / "tokenizer.json.partial"
    partial.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    partial.replace(source)


def _check_new(base: Tokenizer, texts: Sequence[str]) -> None:
    known = [text for text in texts if len(base.encode(text)[0]) == 1 and base.decode(base.encode(text)[0]) == text]
    if known:
        hint = "leave them out; `leading_space: false` adds words without the space before them"
        raise RequestError("tokens cannot be added", [Problem("model.add_tokens", f"one token already: {_listed(known)}", hint)])


def check_read_back(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Refuse tokens that are not found in a text, or that come back as another text.

    Raises:
        RequestError: lists them.
    """
    wrong = []
    for text in texts:
        ids = tokenizer.encode(f"a{text} b")[0]
        if tokenizer.backend.token_to_id(text) not in ids or not tokenizer.decode(ids).endswith(f"a{text} b"):
            wrong.append(text)
    if wrong:
        what = f"this tokenizer does not read back as written: {_listed(wrong)}"
        raise RequestError("tokens cannot be added", [Problem("model.add_tokens", what, "leave them out")])


def _listed(texts: Sequence[str]) -> str:
    more = f", ... and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
    return ", ".join(f"`{text}`" for text in texts[:_LISTED]) + more
