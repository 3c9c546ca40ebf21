"""Merges that are looked for: greedy soups, sweeps, searches, learned weights, and the judge they ask."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_chat_model import write_tiny_chat_model

from ftcli.errors import RecipeError, RequestError, RunError
from ftcli.merging.methods.registry import METHODS
from ftcli.merging.search.cma import CmaEs
from ftcli.merging.search.domains import nearest
from ftcli.merging.search.log import EvaluationLog, Judge
from ftcli.merging.search.recipe import read_search_recipe
from ftcli.merging.search.run import plan_search, run_search
from ftcli.merging.search.soup import greedy_soup, sweep
from ftcli.merging.search.space import Space, search
from ftcli.merging.special import open_special
from ftcli.recipe.yaml import dump, parse


def judged(value: Callable[[Mapping[str, Any]], float], path: Path | None = None, fingerprint: str = "") -> EvaluationLog:
    """A log whose judge computes."""
    return EvaluationLog(Judge(lambda c: {"s": {"loss": -value(c)}}, lambda scores: -scores["s"]["loss"]), path, fingerprint)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_greedy_soup_is_never_below_its_best_model(targets: list[float], seed: int) -> None:
    models = np.random.default_rng(seed).standard_normal((len(targets), 3))
    goal = np.array([*targets, 0.0, 0.0])[:3]

    def value(candidate: Mapping[str, Any]) -> float:
        return -float(np.sum((np.array(candidate["weight"]) @ models - goal) ** 2))

    log = judged(value)
    soup = greedy_soup(len(targets), log)
    assert soup.best.value >= max(single.value for single in soup.singles)
    assert len(log.evaluations) <= 2 * len(targets) - 1
    assert soup.best.candidate["weight"] == [1 / len(soup.chosen) if i in soup.chosen else 0 for i in range(len(targets))]
    assert [soup.singles[i].value for i in soup.order] == sorted((single.value for single in soup.singles), reverse=True)


def test_a_model_that_does_not_hurt_is_kept_and_one_that_does_is_not() -> None:
    losses = {(0,): 3.0, (1,): 1.0, (2,): 2.0, (1, 2): 1.0, (0, 1, 2): 1.1}
    log = judged(lambda c: -losses[tuple(i for i, weight in enumerate(c["weight"]) if weight)])
    soup = greedy_soup(3, log)
    assert (soup.chosen, soup.order) == ((1, 2), (1, 2, 0))
    assert len(log.evaluations) == 5


def test_a_sweep_measures_every_point_and_takes_the_best() -> None:
    points, best = sweep((1.0, 0.0, 0.4), judged(lambda c: -abs(c["alpha"] - 0.5)))
    assert [point.candidate["alpha"] for point in points] == [0.0, 0.4, 1.0]
    assert best.candidate == {"alpha": 0.4}


def test_a_log_asks_once_and_remembers_over_a_kill(tmp_path: Path) -> None:
    asked = []

    def value(candidate: Mapping[str, Any]) -> float:
        asked.append(candidate["alpha"])
        return float(candidate["alpha"])

    path = tmp_path / "log.jsonl"
    first = judged(value, path, "f")
    assert [first({"alpha": a}).value for a in (0.1, 0.2, 0.1)] == [0.1, 0.2, 0.1]
    assert len(first.evaluations) == 2
    with path.open("a") as file:
        file.write('{"candidate": {"alpha": 0.3}, "sco')  # the line that a kill cut
    second = judged(value, path, "f")
    assert [second({"alpha": a}).value for a in (0.1, 0.2, 0.3)] == [0.1, 0.2, 0.3]
    assert asked == [0.1, 0.2, 0.3]
    assert second.num_measured == 1
    assert [json.loads(line).get("candidate") for line in path.read_text().splitlines()] == [
        None,
        {"alpha": 0.1},
        {"alpha": 0.2},
        {"alpha": 0.3},
    ]
    with pytest.raises(RunError, match="another search"):
        judged(value, path, "g")


@pytest.mark.parametrize(("dimension", "generations"), [(1, 40), (4, 120)])
def test_cma_es_finds_the_top_of_a_stretched_hill(dimension: int, generations: int) -> None:
    goal = np.linspace(0.2, 0.9, dimension)
    scale = 10.0 ** np.arange(dimension)

    def walk(seed: int) -> np.ndarray[Any, Any]:
        cma, best = CmaEs([0.5] * dimension, 0.25, seed), (-np.inf, np.zeros(dimension))
        for _ in range(generations):
            points = cma.ask()
            values = [-float(np.sum(scale * (point - goal) ** 2)) for point in points]
            cma.tell(points, values)
            best = max([best, *zip(values, points, strict=True)], key=lambda pair: pair[0])
        return best[1]

    np.testing.assert_allclose(walk(1), goal, atol=1e-3)
    np.testing.assert_array_equal(walk(2), walk(2))
    assert not np.array_equal(walk(2), walk(3))


@pytest.mark.parametrize("algorithm", ["cma-es", "random"])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_search_is_reproducible_within_budget_and_never_below_its_best_model(algorithm: Any, method: str) -> None:
    space = Space(METHODS[method], 3, {"weight": (0.0, 1.0)} | ({"density": (0.2, 1.0)} if method == "ties" else {}), {})

    def value(candidate: Mapping[str, Any]) -> float:
        if "model" in candidate:
            return [0.1, 0.9, 0.3][int(candidate["model"])]
        return 1 - abs(candidate["weight"][0] - 0.7) - abs(candidate["weight"][2] - 0.1)

    def found(seed: int, budget: int) -> tuple[EvaluationLog, Any]:
        log = judged(value)
        return log, search(space, log, algorithm=algorithm, budget=budget, seed=seed)

    log, best = found(5, 40)
    again, same = found(5, 40)
    assert best == same
    assert [e.candidate for e in log.evaluations] == [e.candidate for e in again.evaluations]
    assert len(log.evaluations) == 40
    assert best.value >= 0.9
    assert [e.candidate for e in found(6, 40)[0].evaluations] != [e.candidate for e in log.evaluations]
    assert found(5, 3)[1].candidate == {"model": 1}


def test_groups_of_layers_have_weights_of_their_own() -> None:
    space = Space(METHODS["linear"], 2, {"weight": (0.0, 1.0)}, {"normalize": False}, 3)
    assert len(space.variables) == 6
    candidate = space.candidate(np.arange(6) / 10)
    assert candidate == {"normalize": False, "weight": [[0.0, 0.1], [0.2, 0.3], [0.4, 0.5]]}
    assert [each["weight"] for each in space.each_group(candidate)] == [(0.0, 0.1), (0.2, 0.3), (0.4, 0.5)]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base, three models that were changed in different directions, and rows to measure on."""
    import torch
    from safetensors.torch import load_file, save_file

    write_tiny_chat_model(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for index, size in enumerate((0.01, 0.02, 0.05)):
        write_tiny_chat_model(tmp_path / f"m{index}")
        generator = torch.Generator().manual_seed(index)
        changed = {name: tensor + size * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
        save_file(changed, tmp_path / f"m{index}" / "model.safetensors", {"format": "pt"})
    for name, letters in (("rows", "abc"), ("kept", "xyz")):
        texts = [{"text": letters[i % 3] * 3 + " " + letters[(i + 1) % 3] * 4} for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return tmp_path


def run(folder: Path, document: dict[str, Any], output: str = "out") -> dict[str, Any]:
    sources = [
        {"name": "rows", "source": {"kind": "file", "path": "rows.jsonl"}},
        {"name": "kept", "source": {"kind": "file", "path": "kept.jsonl"}, "role": "retained"},
    ]
    text = dump({"evaluate": {"sources": sources, "max_length": 64}, **document})
    path = folder / "search.yaml"
    path.write_text(text)
    recipe = read_search_recipe(parse(text), path)
    assert plan_search(recipe, path)
    return run_search(recipe, text, path, folder / output, threads=1)


def loss_of(folder: Path, model: str) -> float:
    """The loss of a model folder on the rows, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from ftcli.models.tokenizer import load_tokenizer

    tokenizer, module = load_tokenizer(str(folder / "base")), AutoModelForCausalLM.from_pretrained(folder / model, dtype="float32")
    total, count = 0.0, 0
    for line in (folder / "rows.jsonl").read_text().splitlines():
        ids = tokenizer.encode(json.loads(line)["text"])[0]
        ids = torch.tensor([[tokenizer.bos_id, *ids, tokenizer.eos_id]])
        with torch.no_grad():
            log_probs = module(ids).logits.log_softmax(-1)
        total -= float(log_probs[0, :-1].gather(-1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    return total / count


def test_a_greedy_soup_of_models_is_measured_written_and_measured_again(models: Path) -> None:
    report = run(models, {"merge_method": "greedy_soup", "models": ["m0", "m1", "m2"]})
    losses = [loss_of(models, f"m{index}") for index in range(3)]
    assert report["scores"]["rows"]["loss"] <= min(losses) + 1e-6
    assert report["order"] == [f"m{index}" for index in sorted(range(3), key=lambda index: losses[index])]
    assert report["evaluations"] <= 5
    assert report["written"]["rows"]["loss"] == pytest.approx(report["scores"]["rows"]["loss"], abs=1e-5)
    assert loss_of(models, "out") == pytest.approx(report["scores"]["rows"]["loss"], abs=1e-4)
    files = {path.name for path in (models / "out").iterdir()}
    assert {"evaluations.jsonl", "search.json", "search.yaml", "manifest.json", "model.safetensors"} <= files
    assert "greedy soup of" in (models / "out" / "README.md").read_text()
    assert str(models) not in (models / "out" / "README.md").read_text()


def test_a_sweep_shows_what_is_gained_and_what_is_lost(models: Path) -> None:
    document = {"merge_method": "wise_ft", "base_model": "base", "models": ["m1"], "alphas": [0.0, 0.5, 1.0]}
    report = run(models, document)
    assert [row["alpha"] for row in report["sweep"]] == [0.0, 0.5, 1.0]
    ends = [row["scores"]["rows"]["loss"] for row in report["sweep"]][::2]
    assert ends == pytest.approx([loss_of(models, name) for name in ("base", "m1")], abs=1e-4)
    assert report["value"] == max(row["value"] for row in report["sweep"])
    assert b"kept (retained)" in (models / "out" / "search.svg").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"search": {"budget": 7, "layer_groups": 2}},
        {"search": {"method": "ties", "ranges": {"weight": [0, 1], "density": [0.3, 1]}, "budget": 6, "algorithm": "random"}},
        {"search": {"method": "dare_linear", "fixed": {"density": 0.5}, "budget": 6}, "seed": 3},
    ],
)
def test_what_a_search_finds_is_what_is_written(change: dict[str, Any], models: Path) -> None:
    report = run(models, {"merge_method": "search", "models": ["m0", "m1"], "base_model": "base", **change})
    assert report["value"] >= max(-loss_of(models, "m0"), -loss_of(models, "m1")) - 1e-6
    assert report["evaluations"] <= change["search"]["budget"]
    assert report["written"]["rows"]["loss"] == pytest.approx(report["scores"]["rows"]["loss"], abs=1e-5)


def test_a_search_goes_on_where_it_was_killed(models: Path) -> None:
    document = {"merge_method": "search", "models": ["m0", "m1"], "search": {"budget": 6}}
    whole = run(models, document)
    folder = models / ".search-two"
    folder.mkdir()
    lines = (models / "out" / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (folder / "evaluations.jsonl").write_text("".join(lines[:4]) + lines[4][:9])
    resumed = run(models, document, "two")
    assert resumed["measured_now"] == 3
    assert (models / "two" / "evaluations.jsonl").read_text() == (models / "out" / "evaluations.jsonl").read_text()
    assert (models / "two" / "model.safetensors").read_bytes() == (models / "out" / "model.safetensors").read_bytes()
    assert resumed["best"] == whole["best"]


@pytest.mark.parametrize(
    "document",
    [
        {"merge_method": "wise_ft", "models": ["m2"], "base_model": "base", "alphas": [0.5]},
        {"merge_method": "wise_ft", "models": ["m0"], "base_model": "m2", "alphas": [0.5]},
        {"merge_method": "learned_weights", "models": ["m2", "base"], "base_model": "m2", "steps": 2, "lr": 1e-6, "layer_groups": 2},
    ],
)
def test_no_search_is_below_the_best_of_its_models(document: dict[str, Any], models: Path) -> None:
    """Against transformers' own losses of the models; here what is looked at otherwise is worse than one of them."""
    report = run(models, document)
    names = [*document["models"], *([document["base_model"]] if document["merge_method"] == "wise_ft" else [])]
    best = min(loss_of(models, name) for name in names)
    assert loss_of(models, "out") <= best + 1e-5
    assert report["written"]["rows"]["loss"] <= best + 1e-5
    assert report["evaluations"] >= len(names) + 1
    if "coefficients" in report:
        assert report["uniform"]["rows"]["loss"] > best + 1e-4
        assert report["coefficients"] in ([[1.0, 0.0]] * 2, [[0.0, 1.0]] * 2)


def test_learned_weights_are_never_worse_than_the_uniform_average(models: Path) -> None:
    document = {"merge_method": "learned_weights", "models": ["m0", "m2"], "base_model": "base", "steps": 12, "layer_groups": 2}
    report = run(models, document)
    assert report["scores"]["rows"]["loss"] < report["uniform"]["rows"]["loss"]
    assert len(report["coefficients"]) == 2
    assert report["losses"][-1] < report["losses"][0]
    assert report["written"]["rows"]["loss"] == pytest.approx(report["scores"]["rows"]["loss"], abs=1e-5)


def test_generated_answers_can_decide(models: Path) -> None:
    rows = [{"prompt": f"say {i}", "completion": "a"} for i in range(3)]
    (models / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"name": "rows", "source": {"kind": "file", "path": "rows.jsonl"}}]
    evaluate = {"sources": sources, "max_length": 64, "metric": "exact-match", "max_new_tokens": 4}
    report = run(models, {"merge_method": "greedy_soup", "models": ["m0", "m1"], "evaluate": evaluate})
    assert 0 <= report["scores"]["rows"]["exact-match"] <= 1
    assert report["value"] == report["scores"]["rows"]["exact-match"]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"merge_method": "greedy_soup", "models": ["m0", "m1"], "evalute": {}}, "did you mean `evaluate`"),
        ({"merge_method": "greedy_soup", "models": ["m0"]}, "models"),
        ({"merge_method": "search", "models": ["m0", "m1"], "search": {"budget": 1}}, "measured first"),
        ({"merge_method": "search", "models": ["m0", "m1"], "search": {"method": "ties"}}, "there is none"),
        ({"merge_method": "search", "models": ["m0", "m1"], "search": {"ranges": {"wieght": [0, 1]}}}, "no such parameter"),
        ({"merge_method": "search", "models": ["m0", "m1"], "search": {"ranges": {"weight": [1, 0]}}}, "low below high"),
        ({"merge_method": "search", "models": ["m0", "m1"], "search": {"layer_groups": 9}}, "more than the model's 2 layers"),
        (
            {
                "merge_method": "search",
                "models": ["m0", "m1"],
                "base_model": "base",
                "search": {"method": "ties", "fixed": {"scope": "global"}},
            },
            "measures merges tensor by tensor",
        ),
        ({"merge_method": "greedy_soup", "models": ["m0", "nowhere/at/all"]}, "nowhere"),
        ({"merge_method": "greedy_soup", "models": ["m0", "m1"], "evaluate": {"sources": []}}, "sources"),
    ],
)
def test_a_wrong_search_is_refused_before_anything_is_measured(document: dict[str, Any], message: str, models: Path) -> None:
    with pytest.raises((RecipeError, RequestError), match=message):
        run(models, document)
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"search": {"budget": 1}}, "measured first"),
        ({"search": {"layer_groups": 9}}, "more than the model's 2 layers"),
        ({"evaluate": {"sources": [{"name": "rows", "source": {"kind": "file", "path": "nothere.jsonl"}}]}}, "no such file"),
        ({"evaluate": {"sources": [{"name": "rows", "source": {"kind": "file", "path": "odd.jsonl"}}]}}, "fit no format"),
        ({"evaluate": {"sources": [{"name": "r", "source": {"kind": "file", "path": "rows.jsonl"}}], "weights": {"x": 1}}}, "is no source"),
    ],
)
def test_a_dry_run_looks_at_settings_and_data(document: dict[str, Any], message: str, models: Path) -> None:
    (models / "odd.jsonl").write_text('{"nothing": 1}\n')
    sources = [{"name": "rows", "source": {"kind": "file", "path": "rows.jsonl"}}]
    text = dump({"merge_method": "search", "models": ["m0", "m1"], "evaluate": {"sources": sources}, **document})
    path = models / "dry.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        plan_search(read_search_recipe(parse(text), path), path)


def test_the_nearest_domains_are_chosen() -> None:
    domains = np.array([[10.0, 1, 0], [10.0, 0, 1], [10.0, -1, -1]])
    assert nearest(domains, np.array([9.0, 0.5, 3.0]), 2).chosen == (1, 0)
    assert nearest(domains, domains[2], 1).chosen == (2,)
    assert nearest(domains, domains[2], 1).similarities[2] == pytest.approx(1)
    assert nearest(domains[:1], domains[1], 1).chosen == (0,)


def test_an_adapter_soup_averages_the_true_changes_of_the_nearest(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.merging.lora.adapter import open_adapter

    for index, letters in enumerate(("abc", "xyz", "123")):
        write_adapter(models / f"a{index}", models / "base", index)
        lines = "".join(json.dumps({"text": letters[i % 3] * 9 + letters[(i + 1) % 3] * 9}) + "\n" for i in range(6))
        (models / f"t{index}.jsonl").write_text(lines)
    (models / "new.txt").write_text("aaabbbccc abcabc\n\nbbbb cccc aaaa\n")
    (models / "search.yaml").write_text(
        f"merge_method: adapter_soup\nk: {1}\ntexts: new.txt\nmodels:\n"
        + "".join(f"- {{model: a{index}, texts: t{index}.jsonl}}\n" for index in range(3))
    )
    special = open_special(models / "search.yaml")
    assert special is not None
    assert "3 adapters" in special.plan()[0]
    report = special.run(models / "one", threads=1, verify=True, say=lambda *_: None, note=lambda _: None)
    assert report["chosen"] == ["a0"]
    name = "model.layers.0.self_attn.q_proj"
    parts = [open_adapter("a", models / f"a{index}").delta(name, None) for index in range(3)]
    np.testing.assert_allclose(open_adapter("one", models / "one").delta(name, None), parts[0], atol=1e-6)
    (models / "search.yaml").write_text((models / "search.yaml").read_text().replace("k: 1", "k: 3"))
    special = open_special(models / "search.yaml")
    assert special is not None
    special.run(models / "all", threads=1, verify=True, say=lambda *_: None, note=lambda _: None)
    np.testing.assert_allclose(open_adapter("all", models / "all").delta(name, None), sum(parts) / 3, atol=1e-5)


def write_adapter(folder: Path, base: Path, seed: int) -> None:
    """A LoRA adapter on one layer, as PEFT writes it."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    factors = {name.format("A"): torch.randn(2, 32, generator=generator), name.format("B"): torch.randn(32, 2, generator=generator)}
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_the_command_merges_adapters_and_searches(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ftcli.cli.main import run as run_command

    for index in range(2):
        write_adapter(models / f"a{index}", models / "base", index)
    path = models / "adapters.yaml"
    path.write_text("merge_method: lora_concat\nmodels: [{model: a0, parameters: {weight: 0.5}}, {model: a1, parameters: {weight: 0.5}}]\n")
    assert run_command(["merge", str(path), "--dry-run"]) == 0
    assert "lora_concat: 1 modules" in capsys.readouterr().out
    assert run_command(["merge", str(path), "-o", str(models / "adapter"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["modules"][0]["rank"] == 4
    path.write_text("merge_method: lora_concat\nmodels: [a0, a9/b/c]\n")
    assert run_command(["merge", str(path), "-o", str(models / "no")]) == 2
    assert "a9/b/c" in capsys.readouterr().err
    path.write_text(
        "merge_method: greedy_soup\nmodels: [m0, m1]\nevaluate: {sources: [{source: {kind: file, path: rows.jsonl}}], max_length: 64}\n"
    )
    assert run_command(["merge", str(path), "-o", str(models / "soup"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["evaluations"] <= 3
    assert run_command(["merge", str(path), "-o", str(models / "soup")]) == 2


def test_a_source_of_many_tokens_counts_no_more_than_the_judge_lets_it(models: Path) -> None:
    """The first step's losses, over all batches, add up to what the judge says of the uniform average."""
    (models / "rows.jsonl").write_text("".join(json.dumps({"text": "abc" * 9}) + "\n" for _ in range(3)))
    (models / "kept.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    sources = [{"name": name, "source": {"kind": "file", "path": f"{name}.jsonl"}} for name in ("rows", "kept")]
    evaluate = {"sources": sources, "max_length": 64, "weights": {"rows": 1, "kept": 3}}
    document = {"merge_method": "learned_weights", "models": ["m0"], "base_model": "base", "evaluate": evaluate}
    report = run(models, {**document, "steps": 1, "lr": 1e-9, "layer_groups": 1, "batch_tokens": 4096})
    assert report["losses"][0] == pytest.approx((report["uniform"]["rows"]["loss"] + 3 * report["uniform"]["kept"]["loss"]) / 4, abs=1e-4)
