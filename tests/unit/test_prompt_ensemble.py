"""Ensembles of soft prompts: the vote, their loss, their answers in one batch, and what a run reports of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.conftest import branching_tree, ragged_trees
from tests.unit.soft_prompt_models import byte_tokenizer, context, log_probs, next_token, train_some, write_bases

from ftcli.cli.main import run
from ftcli.data.settings import Generate
from ftcli.errors import RequestError
from ftcli.evaluation.answers import Question, ensemble_scores, score_answers
from ftcli.layout.build import build_batch
from ftcli.layout.model import TreeModel
from ftcli.layout.probe import choose_layout, own_log_probs
from ftcli.layout.virtual import MEMBERS
from ftcli.methods.prefix import Prefix
from ftcli.methods.prompt import Prompt
from ftcli.metrics.exact_match import ExactMatch
from ftcli.models.generate import Answer, elected, generate, member_answers, prompt_ids, stream
from ftcli.models.load import load_model
from ftcli.models.settings import Model
from ftcli.models.tokenizer import Tokenizer
from ftcli.models.vote import is_unanimous, vote

TREES = [*ragged_trees(3), branching_tree()]
PROMPTS = ["a", "Once upon a time there was", "the dog"]
METHODS = [Prompt(prompt_length=5, ensemble=3), Prefix(prefix_length=4, ensemble=2)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return write_bases(tmp_path_factory.mktemp("bases"), "llama", "gpt2", "mistral")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def kind(method: Any) -> str:
    return str(method.kind)


def attached(method: Any, base: Model, tokenizer: Tokenizer) -> Any:
    return method.attach(load_model(base, None), context(tokenizer))


@pytest.mark.parametrize(
    ("answers", "log_probs_of", "winner"),
    [
        (["tea"], [-9.0], 0),
        (["tea", "milk", "tea"], [-9.0, -0.1, -8.0], 2),  # the majority wins, by its likelier member
        (["tea", "milk", "jam"], [-3.0, -1.0, -2.0], 1),  # all different: the likeliest
        (["tea", "tea", "milk", "milk"], [-1.0, -5.0, -2.0, -3.0], 2),  # a tie: -5 beats -6 in sum
        (["tea", "milk"], [-1.0, -1.0], 0),  # nothing between them: the first
        (["", "", "milk"], [-4.0, -4.5, -0.1], 0),  # nothing is an answer, too
        (["", "  ", "milk"], [-4.0, -3.5, -0.1], 1),  # white space around an answer is none of it
        (["Tea", "tea", "milk"], [-4.0, -3.5, -0.1], 2),  # upper case is
    ],
)
def test_most_votes_win_and_likelihood_breaks_ties(answers: list[str], log_probs_of: list[float], winner: int) -> None:
    assert vote(answers, log_probs_of) == winner
    group = [Answer(text, (), True, value) for text, value in zip(answers, log_probs_of, strict=True)]
    assert elected(group) is group[winner]


def test_unanimous_is_when_all_say_the_same() -> None:
    assert is_unanimous(["tea", " tea\n"])
    assert not is_unanimous(["tea", "tea", ""])


@pytest.mark.parametrize("method", METHODS, ids=kind)
@pytest.mark.parametrize("layout", ["forest", "rows"])
def test_its_loss_is_the_mean_of_its_members_losses_and_so_is_the_gradient(
    method: Any, layout: str, bases: dict[str, Model], tokenizer: Tokenizer
) -> None:
    module = attached(method, bases["llama"], tokenizer)
    model = TreeModel(module, layout)
    log_probs(model, TREES).sum().backward()
    together = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    mean = log_probs(model, TREES).detach()
    module.zero_grad()
    alone = []
    for member in method.member_names:
        setattr(module, MEMBERS, (member,))
        alone.append(log_probs(model, TREES))
        (alone[-1].sum() / method.num_members).backward()
    torch.testing.assert_close(torch.stack(alone).mean(dim=0).detach(), mean)
    assert len(together) == method.num_members
    for name, gradient in together.items():
        torch.testing.assert_close(dict(module.named_parameters())[name].grad, gradient)
    assert not torch.allclose(alone[0], alone[1])  # they start differently


def test_an_ensemble_has_no_one_hidden_state(bases: dict[str, Model], tokenizer: Tokenizer) -> None:
    model = TreeModel(attached(METHODS[0], bases["llama"], tokenizer))
    with pytest.raises(RequestError, match="trains on log-probabilities only"):
        model.hidden_states(build_batch("rows", TREES, [tree.tokens * 0.0 for tree in TREES]))


@pytest.mark.parametrize("method", METHODS, ids=kind)
def test_members_are_saved_as_adapters_that_peft_loads(method: Any, bases: dict[str, Model], tokenizer: Tokenizer, tmp_path: Path) -> None:
    from peft import PeftModel

    def fresh() -> Any:
        return load_model(bases["llama"], None)

    model = TreeModel(method.attach(fresh(), context(tokenizer)))
    assert choose_layout(model, TREES, "auto", method.layouts, 64).layout == "forest"
    train_some(method, model, TREES)
    expected = log_probs(model.eval(), TREES).detach()
    method.save(model.module, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == list(method.member_names)
    assert torch.equal(log_probs(TreeModel(method.load(fresh(), tmp_path), "forest").eval(), TREES), expected)
    plain = [PeftModel.from_pretrained(fresh(), tmp_path / member).eval() for member in method.member_names]
    found = torch.stack([own_log_probs(one, TREES, torch.device("cpu")) for one in plain]).mean(dim=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("method", METHODS, ids=kind)
def test_members_answer_in_one_batch_as_they_would_alone(
    method: Any, architecture: str, bases: dict[str, Model], tokenizer: Tokenizer
) -> None:
    module = attached(method, bases[architecture], tokenizer).eval()
    groups = member_answers(module, tokenizer, PROMPTS, max_new_tokens=6)
    model = TreeModel(module).eval()
    for index, member in enumerate(method.member_names):
        setattr(module, MEMBERS, (member,))
        alone = generate(module, tokenizer, PROMPTS, max_new_tokens=6)
        assert [replace(group[index], log_prob=None) for group in groups] == alone
        for prompt, group in zip(PROMPTS, groups, strict=True):
            assert group[index].log_prob == pytest.approx(_log_prob(model, tokenizer, prompt, group[index]), abs=1e-4)
    setattr(module, MEMBERS, method.member_names)
    assert generate(module, tokenizer, PROMPTS, max_new_tokens=6) == [elected(group) for group in groups]
    assert list(stream(module, tokenizer, PROMPTS[1], max_new_tokens=6)) == [elected(groups[1]).text]


@torch.no_grad()
def _log_prob(model: TreeModel, tokenizer: Tokenizer, prompt: str, answer: Answer) -> float:
    """Teacher-forced, with the token that ended the answer."""
    import numpy as np

    from ftcli.data.tree import SPAN, path_tree

    ids, total = list(prompt_ids(tokenizer, prompt)), 0.0
    last = [next_token(model, [*ids, *answer.tokens])] if answer.stopped else []
    whole = np.array([*ids, *answer.tokens, *last], dtype=np.int32)
    weights = (np.arange(len(whole)) >= len(ids)).astype(np.float32)
    batch = build_batch("rows", [path_tree(whole, np.zeros(0, dtype=SPAN), 0, 0)], [weights])
    total += float(model(batch).sum())
    return total


def test_scores_name_the_members_the_best_of_them_and_the_gain(bases: dict[str, Model], tokenizer: Tokenizer) -> None:
    module = attached(METHODS[0], bases["llama"], tokenizer).eval()
    groups = member_answers(module, tokenizer, PROMPTS, max_new_tokens=4)
    # the second member is always right, the others only where they agree with it
    questions = [Question("row", prompt, group[1].text) for prompt, group in zip(PROMPTS, groups, strict=True)]
    settings = Generate(metrics=(ExactMatch(),), max_new_tokens=4)
    scores, samples = score_answers(module, tokenizer, questions, settings, None)
    assert scores["members"]["member-1"] == {"exact-match": 1.0}
    assert scores["best_member_exact-match"] == 1.0
    assert scores["gain_exact-match"] == scores["exact-match"] - 1.0
    assert scores["unanimous_ratio"] == sum(is_unanimous([a.text for a in group]) for group in groups) / 3
    assert [sample["members"] for sample in samples] == [[answer.text for answer in group] for group in groups]
    assert ensemble_scores({"f": 0.5}, [{"f": 0.25}, {"f": 0.75}])["gain_f"] == -0.25


def test_a_run_trains_reports_and_answers_with_its_members(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = {"kind": "builtin", "name": "orders"}
    generated = {"metrics": [{"kind": "exact-match"}], "max_new_tokens": 8}
    document = {
        "version": 1,
        "name": "voted",
        "model": {"base": "builtin:tiny"},
        "data": {
            "train": [{"source": source, "limit": 6}],
            "evaluation": [{"name": "orders", "source": {**source, "split": "test"}, "limit": 2, "generate": generated}],
            "max_length": 512,
        },
        "method": {"kind": "prompt", "prompt_length": 4, "ensemble": 3},
        "train": {"steps": 2, "global_batch_size": 3},
        "output": str(tmp_path / "voted"),
    }
    (tmp_path / "voted.yaml").write_text(json.dumps(document))
    assert run(["train", str(tmp_path / "voted.yaml"), "--json"]) == 0
    after = json.loads(capsys.readouterr().out)["after"]["orders"]
    assert set(after["members"]) == {"member-0", "member-1", "member-2"}
    assert {"unanimous_ratio", "best_member_exact-match", "gain_exact-match", "exact-match", "loss"} <= set(after)
    assert (tmp_path / "voted/adapter/member-2/adapter_model.safetensors").is_file()
    samples = [json.loads(line) for line in (tmp_path / "voted/samples.jsonl").read_text().splitlines()]
    assert all(len(sample["members"]) == 3 for sample in samples)
    assert run(["generate", str(tmp_path / "voted"), "two teas", "--max-new-tokens", "4", "--json"]) == 0
    assert "adapter of run" in json.loads(capsys.readouterr().out)["target"]
    assert run(["generate", str(tmp_path / "voted"), "two teas", "--max-new-tokens", "4"]) == 0
    capsys.readouterr()
    assert run(["merge", str(tmp_path / "voted")]) == 2
    assert "a soft prompt cannot be merged" in capsys.readouterr().err
