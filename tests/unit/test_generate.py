"""Generation: batches, streams, stops, and a model that is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_chat_model import CONTEXT, write_tiny_chat_model

from ftcli.errors import RequestError
from ftcli.layout.attention import FOREST_ATTENTION, register_forest_attention
from ftcli.models.conversation import Conversation
from ftcli.models.generate import PieceDecoder, Sampling, generate, ordinary_attention, prompt_ids, stream
from ftcli.models.tokenizer import Tokenizer, load_tokenizer

PROMPTS = ["a", "Once upon a time there was", "the dog", "", "héllo wörld", "x" * 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tiny_chat_model(path)
    return path


@pytest.fixture
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(str(folder))


def test_batched_answers_equal_answers_one_by_one(model: Any, tokenizer: Tokenizer) -> None:
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=3)
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert together == alone


def test_greedy_answers_are_the_likeliest_tokens(model: Any, tokenizer: Tokenizer) -> None:
    ids = prompt_ids(tokenizer, "the dog")
    expected = list(ids)
    with torch.no_grad():
        for _ in range(8):
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    answer = generate(model, tokenizer, ["the dog"], max_new_tokens=8)[0]
    assert [*ids, *answer.tokens] == expected[: len(ids) + len(answer.tokens)]


def test_the_streamed_text_is_the_generated_text(model: Any, tokenizer: Tokenizer) -> None:
    for prompt in PROMPTS:
        whole = generate(model, tokenizer, [prompt], max_new_tokens=20)[0].text
        assert "".join(stream(model, tokenizer, prompt, max_new_tokens=20)) == whole


def test_a_stream_holds_back_half_a_character(tokenizer: Tokenizer) -> None:
    pieces = PieceDecoder(tokenizer, tokenizer.encode("price: ")[0])
    assert [pieces.add(token) for token in tokenizer.encode("5€ é")[0]] == ["5", "", "", "€", " ", "", "é"]
    half = tokenizer.encode("€")[0][:2]
    assert [pieces.add(token) for token in half] == ["", ""]
    assert pieces.rest() == "�"


def test_an_answer_stops_at_a_stop_token_and_is_without_it(model: Any, tokenizer: Tokenizer) -> None:
    long = generate(model, tokenizer, ["the dog"], max_new_tokens=8)[0]
    assert not long.stopped
    third = long.tokens[2]
    stopping = SubstituteStops(tokenizer, (third,))
    short = generate(model, stopping, ["the dog", "a"], max_new_tokens=8)[0]  # type: ignore[arg-type]
    assert short.stopped
    assert short.tokens == long.tokens[: long.tokens.index(third)]
    assert "".join(stream(model, stopping, "the dog", max_new_tokens=8)) == short.text  # type: ignore[arg-type]


class SubstituteStops:
    """A tokenizer with other stop tokens."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.stop_ids = stop_ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def test_an_answer_ends_where_the_context_ends(model: Any, tokenizer: Tokenizer) -> None:
    tokens_left = 5
    prompt = "y" * (CONTEXT - 1 - tokens_left)  # and BOS
    answers = generate(model, tokenizer, [prompt, "a"], max_new_tokens=20)
    assert len(answers[0].tokens) <= tokens_left
    assert answers == [generate(model, tokenizer, [text], max_new_tokens=20)[0] for text in (prompt, "a")]


def test_a_prompt_as_long_as_the_context_is_refused(model: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="prompt 2: 64 tokens leave no room for an answer in a context of 64"):
        generate(model, tokenizer, ["a", "y" * (CONTEXT - 1)], max_new_tokens=1)


def test_no_prompts_have_no_answers(model: Any, tokenizer: Tokenizer) -> None:
    assert generate(model, tokenizer, [], max_new_tokens=1) == []


def test_the_same_seed_gives_the_same_samples_and_leaves_the_random_state(model: Any, tokenizer: Tokenizer) -> None:
    state = torch.get_rng_state()
    first, again, other = (generate(model, tokenizer, PROMPTS, max_new_tokens=12, sampling=Sampling(1.5, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_top_k_of_one_is_greedy(model: Any, tokenizer: Tokenizer) -> None:
    greedy = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6, sampling=Sampling(2.0, top_k=1)) == greedy
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6, sampling=Sampling(2.0, top_p=1e-6)) == greedy


def test_a_stop_text_ends_an_answer_and_the_work_on_it(model: Any, tokenizer: Tokenizer) -> None:
    whole = generate(model, tokenizer, PROMPTS, max_new_tokens=30)
    shortest = min((answer for answer in whole if not answer.stopped), key=lambda answer: len(answer.text))
    stop = shortest.text[4:6]
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=30, stop=["", "not there", stop], batch_size=1)
    num_passes = len(passes)
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=30, stop=[stop])
    for found, batched, full in zip(answers, together, whole, strict=True):
        assert found.text == batched.text == full.text.split(stop)[0]
        assert found.stopped is (full.stopped or stop in full.text)
        assert found.tokens == full.tokens[: len(found.tokens)]
    assert num_passes <= sum(len(answer.tokens) + 1 for answer in answers) < sum(len(answer.tokens) for answer in whole)


def test_a_models_own_generation_settings_do_not_change_the_answer(model: Any, tokenizer: Tokenizer) -> None:
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=1.8, max_length=3)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == plain
    assert model.generation_config.repetition_penalty == 1.8


def test_a_model_in_the_forest_layout_generates_and_stays_in_it(model: Any, tokenizer: Tokenizer) -> None:
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    register_forest_attention()
    model.set_attn_implementation(FOREST_ATTENTION)
    model.train()
    model.model.layers[0].eval()
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == plain
    assert model.config._attn_implementation == FOREST_ATTENTION
    assert (model.training, model.model.layers[0].training, model.model.layers[1].training) == (True, False, True)


def test_the_model_is_put_back_after_an_error(model: Any) -> None:
    register_forest_attention()
    model.set_attn_implementation(FOREST_ATTENTION)
    with pytest.raises(ZeroDivisionError, match="in sdpa"), ordinary_attention(model):
        raise ZeroDivisionError(f"in {model.config._attn_implementation}")
    assert model.config._attn_implementation == FOREST_ATTENTION


def test_a_closed_stream_ends_and_puts_the_model_back(model: Any, tokenizer: Tokenizer) -> None:
    model.train()
    pieces = stream(model, tokenizer, "a", max_new_tokens=40)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert model.training


def test_an_error_in_the_model_reaches_the_reader_of_the_stream(model: Any, tokenizer: Tokenizer) -> None:
    model.model.embed_tokens = None
    with pytest.raises(TypeError):
        list(stream(model, tokenizer, "a", max_new_tokens=4))


def test_progress_counts_prompts(model: Any, tokenizer: Tokenizer) -> None:
    seen: list[tuple[int, int]] = []

    class Watch:
        def update(self, done: int, total: int, what: str) -> None:
            seen.append((done, total))

    generate(model, tokenizer, PROMPTS, max_new_tokens=1, batch_size=4, progress=Watch())
    assert seen == [(4, 6), (6, 6)]


def test_bos_is_put_once(tokenizer: Tokenizer) -> None:
    assert prompt_ids(tokenizer, "a") == prompt_ids(tokenizer, "<s>a") == [tokenizer.bos_id, *tokenizer.encode("a")[0]]


def test_a_conversation_drops_its_oldest_turns_and_keeps_the_last(tokenizer: Tokenizer) -> None:
    talk = Conversation(tokenizer, system="be brief")
    for number in range(3):
        talk.ask(f"question {number}")
        talk.answer(f"answer {number}")
    talk.ask("last")
    assert talk.drop_to_fit(None) == 0
    whole = len(prompt_ids(tokenizer, talk.prompt()))
    assert talk.drop_to_fit(whole) == 0
    assert talk.drop_to_fit(whole - 1) == 2
    assert [turn["content"] for turn in talk.turns] == ["question 1", "answer 1", "question 2", "answer 2", "last"]
    assert talk.drop_to_fit(1) == 4
    assert talk.prompt() == "system: be brief</s>user: last</s>assistant: "
