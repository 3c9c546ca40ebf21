"""A tokenizer as GGUF has it: the pieces with their kinds, and what llama.cpp needs to cut text the same way.

llama.cpp has its own code for cutting text, chosen by names in the file. So a tokenizer is matched by what it does: a byte-level
BPE to the named rule that cuts the probe texts alike, a SentencePiece-like BPE to scores that merge in the same order. What cannot be
matched is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcli.errors import DataError, Problem, RequestError

if TYPE_CHECKING:
    import tokenizers

    from ftcli.models.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES = {
    "gpt-2": (_GPT2, False),
    "llama-bpe": (_LLAMA3, True),
    "qwen2": (_QWEN2, False),
    "tekken": (_TEKKEN, True),
    "gpt-4o": (_GPT4O, False),
}
"""llama.cpp's rules for cutting text before merging: (regular expression, whole words of the vocabulary are taken unmerged)."""
_NO_MERGE = "\u0100 \u0100"  # two NULs: llama.cpp wants a merge, and takes one apart again whose result is no piece
PROBE_TEXTS = (
    "Hello world, it's 12345 o'clock; I'LL SAY: don't!",
    "  two  spaces\tand\n\n lines \r\n end ",
    "Übung macht den Meister. El niño corrió 3,14 km. 春は曙。 Привет",
    'def area(width: float) -> float:\n    return width * 2**10  # ok\n{"a": [1, 22, 333, 4444]}',
    "CamelCaseWords andLower XMLHttp's ÉCOLE été / or // and\n\n\n more... !?",
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a GGUF file says about the tokenizer."""

    model: str
    """`gpt2` (byte-level BPE) or `llama` (SentencePiece-like)."""
    rule: str
    """How text is cut before merging."""
    tokens: list[bytes]
    kinds: list[int]
    scores: list[float]
    """Empty for `gpt2`."""
    merges: list[str]
    """Empty for `llama`."""
    adds_space: bool
    """A space goes before a text."""


def vocabulary_of(tokenizer: Tokenizer, num_rows: int) -> Vocabulary:
    """The vocabulary, with placeholders for rows of the embedding that no token has.

    Raises:
        RequestError: llama.cpp has no tokenizer that does the same.
    """
    backend = tokenizer.backend
    content = json.loads(backend.to_str())
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refused(f"it is a `{model.get('type')}` tokenizer (kinds: byte-level BPE, SentencePiece-like BPE with bytes)")
    tokens, kinds = _pieces(tokenizer, content, num_rows)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    if "ByteLevel" in json.dumps(content["pre_tokenizer"]):
        return Vocabulary("gpt2", _rule(tokenizer, model), tokens, kinds, [], merges or [_NO_MERGE], adds_space=False)
    if not model.get("byte_fallback"):
        raise _refused("it is neither byte-level nor falls back to bytes")
    _require_same_pieces(tokenizer, model)
    return Vocabulary("llama", "default", tokens, kinds, _scores(model, len(tokens)), [], _adds_space(tokenizer))


def conversation_text(tokenizer: Tokenizer) -> str | None:
    """A conversation as the chat template writes it; None where there is none, or where it refuses."""
    if tokenizer.chat_template is None:
        return None
    turns = [("user", "How many apples are left?"), ("assistant", "Five."), ("user", "And pears?")]
    try:
        return tokenizer.render([{"role": role, "content": text} for role, text in turns], add_generation_prompt=True)
    except DataError:
        return None


def strips_after_special(tokenizer: Tokenizer) -> bool:
    """Does the tokenizer drop white space behind special tokens, as Phi-3's does?"""
    kept = ("<unk>", "<s>", "<|endoftext|>")
    added = json.loads(tokenizer.backend.to_str())["added_tokens"]
    return any(entry["rstrip"] and entry["special"] and entry["content"] not in kept for entry in added)


def _pieces(tokenizer: Tokenizer, content: dict[str, Any], num_rows: int) -> tuple[list[bytes], list[int]]:
    """(pieces, their kinds) by id."""
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    is_byte_fallback = bool(content["model"].get("byte_fallback"))
    by_id = {index: token for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    unknown = tokenizer.special.get("unk_token") or content["model"].get("unk_token")
    tokens, kinds = [], []
    for index in range(max(num_rows, max(by_id) + 1)):
        token = by_id.get(index)
        if token is None:
            tokens.append(f"[PAD{index}]".encode())
            kinds.append(UNUSED)
            continue
        tokens.append(token.encode("utf-8"))
        if is_byte_fallback and token == unknown:
            kinds.append(UNKNOWN)
        elif index in added:
            kinds.append(CONTROL if added[index]["special"] else USER_DEFINED)
        else:
            is_byte = is_byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            kinds.append(BYTE if is_byte else NORMAL)
    return tokens, kinds


def _rule(tokenizer: Tokenizer, model: dict[str, Any]) -> str:
    """The named rule with which the same merges cut every probe text as the tokenizer does; the one it names itself comes first."""
    expected = [tokenizer.encode(text)[0] for text in PROBE_TEXTS]
    own = json.dumps(json.loads(tokenizer.backend.to_str())["pre_tokenizer"])
    for name, (expression, ignores_merges) in sorted(RULES.items(), key=lambda rule: json.dumps(rule[1][0])[1:-1] not in own):
        other = _with_rule(tokenizer, model, expression, ignores_merges)
        if [other.encode(text, add_special_tokens=False).ids for text in PROBE_TEXTS] == expected:
            return name
    raise _refused(f"it cuts text as none of llama.cpp's rules that ftcli knows does (rules: {', '.join(RULES)})")


def _with_rule(tokenizer: Tokenizer, model: dict[str, Any], expression: str, ignores_merges: bool) -> tokenizers.Tokenizer:
    """The tokenizer as llama.cpp runs it: the same pieces and merges, another rule, no normalisation."""
    import tokenizers
    from tokenizers import Regex, decoders, pre_tokenizers

    content = json.loads(tokenizer.backend.to_str())
    content["model"] = {**model, "ignore_merges": ignores_merges}
    content["normalizer"] = content["post_processor"] = None
    other = tokenizers.Tokenizer.from_str(json.dumps(content))
    cut = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    other.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    other.decoder = decoders.ByteLevel()
    return other


def _require_same_pieces(tokenizer: Tokenizer, model: dict[str, Any]) -> None:
    """Refuse a tokenizer that makes other pieces of a probe text than llama.cpp would, with a space before it or without.

    Raises:
        RequestError: names the text.
    """
    import tokenizers
    from tokenizers import normalizers

    spaces = normalizers.Replace(" ", "▁")
    others = []
    for normalizer in (spaces, normalizers.Sequence([normalizers.Prepend("▁"), spaces])):
        content = json.loads(tokenizer.backend.to_str())
        content["model"] = {**model, "ignore_merges": False}
        content["normalizer"] = content["pre_tokenizer"] = content["post_processor"] = None
        others.append(tokenizers.Tokenizer.from_str(json.dumps(content)))
        others[-1].normalizer = normalizer
    for text in PROBE_TEXTS:
        if tokenizer.encode(text)[0] not in [other.encode(text, add_special_tokens=False).ids for other in others]:
            raise _refused(f"it makes other pieces of {text!r} than llama.cpp would, which leaves every letter as it is")


def _scores(model: dict[str, Any], num_tokens: int) -> list[float]:
    """A score per piece: the higher, the earlier it is merged. Pieces that no merge makes are never made by one."""
    vocabulary: dict[str, int] = model["vocab"]
    scores = [-float(len(model["merges"]) + 1)] * num_tokens
    for rank, pair in reversed(list(enumerate(model["merges"]))):
        first, second = pair if isinstance(pair, list) else pair.split(" ", 1)
        index = vocabulary.get(first + second)
        if index is not None:
            scores[index] = -float(rank)
    return scores


def _adds_space(tokenizer: Tokenizer) -> bool:
    """Does the tokenizer put a space before a text?

    llama.cpp puts one behind every special token, too. Where a tokenizer puts one only before the very first word, a model that
    talks is asked what its conversations have.
    """
    text = conversation_text(tokenizer) or "a"
    coded = tokenizer.backend.encode(text, add_special_tokens=False)
    added = set(tokenizer.added_texts)
    for piece, (start, _) in zip(coded.tokens, coded.offsets, strict=True):
        if piece not in added:
            return piece.startswith("▁") and text[start] != " "
    return False


def _refused(why: str) -> RequestError:
    return RequestError("the tokenizer cannot become GGUF", [Problem("tokenizer.json", why)])
