"""`ftcli serve`: which models stand beside each other, what each can read, and what a request that says little gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcli.errors import RequestError, UsageError
from ftcli.serving.engine import Engine
from ftcli.serving.models import serve_models
from ftcli.serving.protocol import AnswerRequest, read_request
from ftcli.serving.refusal import ApiError

CONTEXT, PREFIX = 64, 10


def asked(**fields: Any) -> AnswerRequest:
    body = {"model": "soft", "prompt": "x", "max_tokens": 2, **fields}
    return read_request(json.dumps(body).encode(), is_chat=False, token_limit=32)


@pytest.fixture
def engine(base: Path) -> Iterator[Engine]:
    """A base with a context of 64, and a prompt of 10 vectors on it."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    settings = PromptTuningConfig(num_virtual_tokens=PREFIX, task_type="CAUSAL_LM", base_model_name_or_path=str(base))
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(base.parent / "soft")
    engine = Engine(serve_models(str(base), {"soft": str(base.parent / "soft")}))
    yield engine
    engine.close()


def test_a_prompt_beyond_an_adapters_own_context_is_refused_alone(engine: Engine) -> None:
    """Its soft prompt takes room of that adapter's context, and no other's."""
    long = "x" * (CONTEXT - PREFIX)
    with pytest.raises(ApiError, match=f"{CONTEXT - PREFIX} tokens.*a context of {CONTEXT - PREFIX}") as error:
        engine.submit(asked(prompt=long))
    assert (error.value.status, error.value.field) == (400, "prompt")
    jobs = [engine.submit(asked(**fields)) for fields in ({}, {"prompt": long[:-1]}, {"prompt": long, "model": "base"})]
    answers = [job.pieces.get(timeout=60) for job in jobs]
    assert not [answer for answer in answers if isinstance(answer, ApiError)]


def test_sampling_without_a_seed_differs_from_request_to_request(engine: Engine) -> None:
    texts = set()
    for _ in range(8):
        made = engine.submit(asked(model="base", temperature=1.5, max_tokens=8)).pieces.get(timeout=60)
        texts.add(getattr(made, "text", None))
    assert len(texts) > 4
    assert {asked(seed=7).seed, asked(seed=0).seed} == {7, 0}


def test_an_adapter_with_scaled_positions_is_served_alone(make_adapter: Callable[..., Path], base: Path) -> None:
    from ftcli.exporting.difference import logits_on
    from ftcli.exporting.source import open_source

    adapter = make_adapter("far")
    note = {"base": str(base), "fingerprint": "unknown:0", "rope": {"kind": "linear", "factor": 2.0}}
    (adapter / "base.json").write_text(json.dumps(note))
    served = serve_models(str(adapter), {})
    assert served.names == ["far"]
    rows = [list(range(5, 60))]
    torch.testing.assert_close(logits_on(served.use("far"), rows), logits_on(open_source(str(adapter)).attached(), rows))
    with pytest.raises(UsageError, match="is served alone, and cannot carry adapters"):
        serve_models(str(adapter), {"other": str(make_adapter("one"))})
    with pytest.raises(RequestError, match=rf"trained with scaled positions(.|\n)*`ftcli serve {adapter}`"):
        serve_models(str(base), {"far": str(adapter)})


def test_an_adapter_that_is_not_there_is_named_by_its_option(make_adapter: Callable[..., Path], base: Path) -> None:
    make_adapter("stories")
    for folder, hint in ((base.parent / "storis", "did you mean `stories`"), (base, "a run that left an adapter")):
        with pytest.raises(RequestError, match=rf"--adapter k={folder}") as error:
            serve_models(str(base), {"k": str(folder)})
        assert "init_from" not in str(error.value)
        assert hint in str(error.value)
