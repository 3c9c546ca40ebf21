"""Examples become trees whose spans are exactly the trained words, in the tokens that generation will see."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from ftcli.data.example import Example, ExampleSegment, Piece, path_example
from ftcli.data.overflow import fit
from ftcli.data.tokenise import EncodedExample, Tokeniser, digest, num_targets
from ftcli.data.tree import TokenTree, target_weights
from ftcli.errors import DataError
from ftcli.models.tokenizer import Tokenizer, load_tokenizer

MakeTokenizer = Callable[..., Tokenizer]
WORDS = ["the cat", " the cat", "the  cat", "\n\n", " ", "é🙂", "a", "12", "Answer:", "", " Paris", "<|im_end|>", "\n", "  x", "日本"]


def merging_backend(*, metaspace: bool) -> Backend:
    """A tokenizer whose tokens like to reach over the ends of words, of the byte-level or of the Llama kind."""
    words = ["the", "cat", "er", "an", "12", "..", "  "]
    space = "▁" if metaspace else "Ġ"
    words = [word.replace(" ", space) for word in [*words, " the", " cat", " Paris", "\n", "\n\n"]]
    if metaspace:
        letters = [*map(chr, range(33, 127)), space, "\n", *(f"<0x{byte:02X}>" for byte in range(256)), "<unk>"]
    else:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [word.replace("\n", "Ċ") for word in words]
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if pair not in merges:
                merges.append(pair)
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*letters, *("".join(pair) for pair in merges)]))}
    model = models.BPE(vocab=vocab, merges=merges, byte_fallback=metaspace, unk_token="<unk>" if metaspace else None)
    backend = Backend(model)
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
        backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<|im_start|>")])
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True, rstrip=True)])
    return backend


@pytest.fixture(scope="module", params=["byte-level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    merging_backend(metaspace=request.param == "metaspace").save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}', encoding="utf-8")
    return load_tokenizer(str(folder))


def encode(tokenizer: Tokenizer, example: Example) -> EncodedExample:
    return Tokeniser(tokenizer).encode(example, "here", 3)


def trained_texts(tree: TokenTree, tokenizer: Tokenizer) -> list[str]:
    """Text of each span, decoded behind a letter so that a space in front shows."""
    spans = [(start, end) for start, end, _, is_prompt in tree.spans.tolist() if not is_prompt]
    head = tokenizer.encode("a")[0]
    return [tokenizer.decode([*head, *tree.tokens[start:end].tolist()])[1:] for start, end in spans]


def prompt(text: str, weight: float = 1.0) -> Piece:
    return Piece(text, weight, is_prompt=True)


def answer(text: str, weight: float = 1.0) -> Piece:
    return Piece(text, weight, is_prompt=False)


def test_spans_are_the_trained_words(tokenizer: Tokenizer) -> None:
    example = path_example([prompt("Answer:"), answer(" Paris</s>"), prompt(" the"), answer(" cat</s>")], add_bos=True)
    tree = encode(tokenizer, example).tree()
    assert trained_texts(tree, tokenizer) == [" Paris</s>", " cat</s>"]
    assert tree.tokens[0] == tokenizer.bos_id
    assert [bool(span["is_prompt"]) for span in tree.spans] == [True, False, True, False]
    assert tree.spans["start"][0] == 1
    assert (tree.row, tree.num_bytes) == (3, len(" Paris cat"))


def test_a_token_over_the_boundary_is_cut_there(tokenizer: Tokenizer) -> None:
    example = path_example([prompt("Answer: "), answer("Paris</s>")], add_bos=False)
    tree = encode(tokenizer, example).tree()
    start = int(tree.spans["start"][1])
    assert tree.tokens[:start].tolist() == tokenizer.encode("Answer: ")[0]
    assert trained_texts(tree, tokenizer) == ["Paris</s>"]


def test_no_space_appears_behind_a_cut(tokenizer: Tokenizer) -> None:
    tree = encode(tokenizer, path_example([prompt("c"), answer("at</s>")], add_bos=False)).tree()
    assert tokenizer.decode(tree.tokens.tolist()) == "cat</s>"
    assert trained_texts(tree, tokenizer) == ["at</s>"]


def test_prompts_are_encoded_whole_though_their_pieces_differ(tokenizer: Tokenizer) -> None:
    example = path_example([prompt("the c", weight=0.0), prompt("at t", weight=1.0), answer(" Paris</s>")], add_bos=False)
    tree = encode(tokenizer, example).tree()
    start = int(tree.spans["start"][-1])
    assert tree.tokens[:start].tolist() == tokenizer.encode("the cat t")[0]


def test_an_end_token_that_swallows_the_line_break_after_it_stays_as_generation_sees_it(tokenizer: Tokenizer) -> None:
    example = path_example([prompt("a"), answer("the<|im_end|>"), prompt("\nthe"), answer(" cat</s>")], add_bos=False)
    tree = encode(tokenizer, example).tree()
    start = int(tree.spans["start"][-1])
    assert tree.tokens[:start].tolist() == tokenizer.encode("athe<|im_end|>\nthe")[0]
    assert trained_texts(tree, tokenizer)[0] == "the<|im_end|>"


def test_branches_get_no_space_in_front(tokenizer: Tokenizer) -> None:
    segments = (
        ExampleSegment((prompt("c"),), -1),
        ExampleSegment((answer("at</s>"),), 0),
        ExampleSegment((answer("ar"), answer("s</s>", weight=2.0)), 0),
    )
    encoded = encode(tokenizer, Example(segments, add_bos=True))
    tree = encoded.tree()
    bounds = tree.segment_bounds()
    branches = [tree.tokens[: bounds[0][1]].tolist() + tree.tokens[start:end].tolist() for start, end in bounds[1:]]
    assert [tokenizer.decode(branch, skip_special_tokens=True) for branch in branches] == ["cat", "cars"]
    assert tree.parents.tolist() == [-1, 0, 0]
    assert encoded.longest_branch == max(map(len, branches))
    assert tree.num_bytes == len("at" + "ar" + "s")


def test_weights_are_those_of_the_pieces(tokenizer: Tokenizer) -> None:
    pieces = [prompt("a", 0.5), answer("1", 0.0), answer("2", 0.25), answer("1</s>", 2.0)]
    tree = encode(tokenizer, path_example(pieces, add_bos=True)).tree()
    weights = target_weights(tree, prompt_loss_weight=0.5)
    assert set(weights.tolist()) == {0.0, 0.25, 2.0} | ({0.25} if 0.25 in weights else set())
    assert sorted(set(tree.spans["weight"].tolist())) == [0.25, 0.5, 2.0]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_a_weight_that_is_no_weight_is_refused(tokenizer: Tokenizer, weight: float) -> None:
    with pytest.raises(DataError, match="here: weight is"):
        encode(tokenizer, path_example([answer("a", weight)], add_bos=False))


def test_two_bos_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"2 begin-of-text tokens `<s>`"):
        encode(tokenizer, path_example([prompt("<s>a"), answer("b</s>")], add_bos=True))


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_pieces_decode_to_their_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    any_piece = st.builds(
        Piece, st.sampled_from([word for word in WORDS if "<" not in word]), st.sampled_from([0.0, 1.0, 2.0]), st.booleans()
    )
    pieces = data.draw(st.lists(any_piece, min_size=1, max_size=8))
    example = path_example(pieces, add_bos=False)
    encoded = encode(tokenizer, example)
    tree = encoded.tree()
    text = "".join(piece.text for piece in pieces)
    head = tokenizer.encode("a")[0]
    alone = tokenizer.encode(text)[0]
    assert tokenizer.decode([*head, *tree.tokens.tolist()]) == tokenizer.decode([*head, *alone])
    spans = tree.spans.tolist()
    assert all(first[1] <= second[0] for first, second in pairwise(spans))
    trained = "".join(piece.text for piece in pieces if piece.is_trained)
    assert encoded.num_bytes() == encoded.token_bytes().sum() == len(trained.encode())
    joined: list[str] = []
    was_trained = False
    for piece in pieces:
        if piece.is_trained and piece.text:
            joined[len(joined) - was_trained :] = [(joined[-1] if was_trained else "") + piece.text]
        was_trained = piece.is_trained if piece.text else was_trained
    # Without a space that a Llama tokenizer puts in front of the whole, which belongs to the text's first token.
    assert "".join(trained_texts(tree, tokenizer)).lstrip(" ") == "".join(joined).lstrip(" ")


def text_example(tokenizer: Tokenizer, text: str) -> EncodedExample:
    return encode(tokenizer, path_example([answer(text)], add_bos=True))


@pytest.mark.parametrize("text", ["the cat  sees\n\n the dog. 12 cats</s>", "the cat é🙂 12 日本 sees the  cat</s>", "a</s>"])
@pytest.mark.parametrize("pieces", [[(1.0, False)], [(0.0, False), (1.0, False)], [(1.0, True)]])
def test_bytes_of_a_part_are_those_of_its_tokens(tokenizer: Tokenizer, text: str, pieces: list[tuple[float, bool]]) -> None:
    encoded = encode(tokenizer, path_example([Piece(text, *how) for how in pieces], add_bos=True))
    each, between = encoded.token_bytes(), encoded.bytes_between()
    bounds = [(first, end) for first in range(len(each) + 1) for end in range(first, len(each) + 1)]
    assert [between(first, end) for first, end in bounds] == [each[first:end].sum() for first, end in bounds]


@pytest.mark.parametrize("max_length", [2, 3, 7, 50])
def test_split_trains_every_target_once(tokenizer: Tokenizer, max_length: int) -> None:
    example = text_example(tokenizer, "the cat é🙂 12 日本 sees\n\n the the  cat</s>")
    whole = example.tree()
    blocks = fit(example, max_length, "split")
    assert sum(map(num_targets, blocks)) == num_targets(whole) == len(whole) - 1
    assert sum(block.num_bytes for block in blocks) == whole.num_bytes
    assert all(len(block) <= max_length for block in blocks)
    targets = [token for block in blocks for token, weight in zip(block.tokens, target_weights(block, 0.0), strict=True) if weight]
    assert targets == whole.tokens[1:].tolist()
    for before, after in pairwise(blocks):
        assert before.tokens[-1] == after.tokens[0]


def test_split_leaves_out_blocks_without_a_target(tokenizer: Tokenizer) -> None:
    example = encode(tokenizer, path_example([prompt("12" * 21), answer("a</s>")], add_bos=False))
    (block,) = fit(example, 5, "split")
    assert num_targets(block) == 2
    assert block.num_bytes == 1


def test_split_bytes_ignore_special_tokens(tokenizer: Tokenizer) -> None:
    example = encode(tokenizer, path_example([prompt("1"), answer("é<|im_end|>"), prompt("\n2"), answer("a</s>")], add_bos=True))
    assert example.num_bytes() == 3
    assert sum(block.num_bytes for block in fit(example, 3, "split")) == 3


def test_error_and_drop_keep_no_tree_that_is_too_long(tokenizer: Tokenizer) -> None:
    example = text_example(tokenizer, "the cat</s>")
    assert fit(example, len(example.tree()), "error") != []
    assert fit(example, len(example.tree()) - 1, "error") == []
    assert fit(example, len(example.tree()) - 1, "drop") == []


def test_truncate_prompt_cuts_the_beginning_of_the_first_prompt_only(tokenizer: Tokenizer) -> None:
    pieces = [prompt("1 2 3 4"), answer("a</s>"), prompt("5"), answer("b</s>")]
    example = encode(tokenizer, path_example(pieces, add_bos=True))
    whole = example.tree()
    (tree,) = fit(example, len(whole) - 3, "truncate_prompt")
    assert tree.tokens.tolist() == [tokenizer.bos_id, *whole.tokens[4:].tolist()]
    assert trained_texts(tree, tokenizer) == ["a</s>", "b</s>"]
    assert tree.num_bytes == whole.num_bytes


def test_truncate_prompt_never_cuts_the_answer(tokenizer: Tokenizer) -> None:
    pieces = [prompt("1 2"), answer("a a a</s>")]
    with_bos = encode(tokenizer, path_example(pieces, add_bos=True))
    num_prompt = int(with_bos.tree().spans["start"][1])
    num_answer = len(with_bos.tree()) - num_prompt
    (tree,) = fit(with_bos, num_answer + 1, "truncate_prompt")
    assert num_targets(tree) == num_answer
    assert fit(with_bos, num_answer, "truncate_prompt") == []
    without = encode(tokenizer, path_example(pieces, add_bos=False))
    (tree,) = fit(without, num_answer + 1, "truncate_prompt")
    assert num_targets(tree) == num_answer
    assert fit(without, num_answer, "truncate_prompt") == []


def test_truncate_prompt_shortens_every_branch(tokenizer: Tokenizer) -> None:
    segments = (ExampleSegment((prompt("1 2 3 4 5"),), -1), ExampleSegment((answer("a</s>"),), 0), ExampleSegment((answer("bb</s>"),), 0))
    example = encode(tokenizer, Example(segments, add_bos=False))
    whole = example.tree()
    (tree,) = fit(example, example.longest_branch - 2, "truncate_prompt")
    assert tree.tokens.tolist() == whole.tokens[2:].tolist()
    assert tree.starts.tolist() == [0, *(whole.starts[1:] - 2).tolist()]
    assert trained_texts(tree, tokenizer) == trained_texts(whole, tokenizer)
    assert fit(example, 4, "split") == []


def test_every_turn_has_to_stop(tokenizer: Tokenizer) -> None:
    def stops(*pieces: Piece) -> bool:
        return encode(tokenizer, path_example(list(pieces), add_bos=True)).every_turn_stops()

    assert stops(prompt("a"), answer("b</s>"), prompt("a"), answer("c</s>"))
    assert not stops(prompt("a"), answer("b"), prompt("a"), answer("c</s>"))
    assert not stops(prompt("a</s>"), answer("b"))


def test_equal_trees_share_a_digest_whatever_is_trained(tokenizer: Tokenizer) -> None:
    def digest_of(*pieces: Piece) -> int:
        return digest(encode(tokenizer, path_example(list(pieces), add_bos=True)).tree())

    assert digest_of(prompt("1"), answer("2</s>")) == digest_of(answer("12</s>")) or "12" in tokenizer.backend.get_vocab()
    assert digest_of(answer("1</s>")) == digest_of(prompt("1</s>"))
    assert digest_of(answer("1</s>")) != digest_of(answer("2</s>"))
    assert np.uint64(digest_of(answer("1</s>"))) > 0


@pytest.mark.real
@pytest.mark.parametrize(
    "name",
    ["models/stories260K", "models/gpt2-mini-pd", "data/tokenizers/gpt2", "data/tokenizers/mistral-v3", "data/tokenizers/phi-3-mini"],
)
def test_real_tokenizers_keep_prompts_as_generation_sees_them(shared: Path, name: str) -> None:
    tokenizer = load_tokenizer(str(shared / name))
    end = tokenizer.eos_token or ""
    for question in ("What is 2+2? ", "What is 2+2?", "Say:\n\n", "a  ", "1"):
        for reply in ("4", " four", "\n\nfour  words here", "é🙂", "23"):
            tree = encode(tokenizer, path_example([prompt(question), answer(reply + end)], add_bos=False)).tree()
            start = int(tree.spans["start"][1])
            assert tree.tokens[:start].tolist() == tokenizer.encode(question)[0]
            assert tokenizer.decode(tree.tokens.tolist()) == tokenizer.decode(tokenizer.encode(question)[0]) + reply + end
