"""Prompts, prefixes and p-tuning: layouts against PEFT's own forward pass, files, starts, generation, refusals, resume."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tests.laws.conftest import branching_tree, ragged_trees
from tests.unit.soft_prompt_models import byte_tokenizer, context, log_probs, next_token, train_some, tree, write_bases

from ftcli.cli.main import run
from ftcli.errors import RequestError
from ftcli.layout import virtual
from ftcli.layout.model import TreeModel
from ftcli.layout.probe import choose_layout, own_log_probs
from ftcli.methods.p_tuning import PTuning
from ftcli.methods.prefix import Prefix
from ftcli.methods.prompt import Prompt, embedded
from ftcli.methods.soft_prompt import SoftPrompt
from ftcli.models.generate import context_length, generate, prompt_ids, stream
from ftcli.models.load import load_model
from ftcli.models.settings import Model
from ftcli.models.tokenizer import Tokenizer

TREES = [*ragged_trees(3), branching_tree()]
METHODS = [
    Prompt(prompt_length=5),
    PTuning(prompt_length=5),
    PTuning(prompt_length=5, encoder="lstm", encoder_size=8),
    Prefix(prefix_length=5),
    Prefix(prefix_length=14),  # longer than the windows
    Prefix(prefix_length=5, reparametrise=8),
]
ARCHITECTURES = ("llama", "gpt2", "qwen3", "mistral", "gemma2")
PROMPTS = ["a", "Once upon a time there was", "the dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def bases(folder: Path) -> dict[str, Model]:
    return write_bases(folder, *ARCHITECTURES, "mamba", "deepseek_v3")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return byte_tokenizer(folder / "tokenizer")


def described(method: SoftPrompt) -> str:
    return "-".join(map(str, method.model_dump(exclude_defaults=True).values())) + method.kind  # type: ignore[attr-defined]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS, ids=described)
def test_layouts_equal_peft_the_base_rests_and_what_is_saved_is_what_was_trained(
    method: SoftPrompt, architecture: str, bases: dict[str, Model], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from peft import PeftModel

    def fresh() -> Any:
        return load_model(bases[architecture], None)

    model = TreeModel(method.attach(fresh(), context(tokenizer)))
    # choose_layout itself raises where rows differ from PEFT's own forward pass
    assert choose_layout(model, TREES, "auto", method.layouts, 64).layout == "forest"
    losses = train_some(method, model, TREES, 3)
    assert losses[-1] < losses[0]
    trained = dict(model.module.get_base_model().named_parameters())  # type: ignore[operator, union-attr]
    assert all(torch.equal(p, trained[name]) and not trained[name].requires_grad for name, p in fresh().named_parameters())

    model.eval()
    expected = log_probs(model, TREES).detach()
    method.save(model.module, tmp_path / "adapter")
    reloaded = TreeModel(method.load(fresh(), tmp_path / "adapter"), "forest")
    assert torch.equal(log_probs(reloaded, TREES), expected)
    assert not any(parameter.requires_grad for parameter in reloaded.parameters())
    plain = own_log_probs(PeftModel.from_pretrained(fresh(), tmp_path / "adapter").eval(), TREES, torch.device("cpu"))
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("layout", ["rows", "forest"])
@pytest.mark.parametrize("kind", [Prompt, Prefix])
def test_a_start_from_text_is_the_base_with_that_text_before_the_example(
    kind: Any, layout: str, architecture: str, bases: dict[str, Model], tokenizer: Tokenizer
) -> None:
    """Soft prompts have no start at the identity; this is what they have instead."""
    text, example = "Answer in rhyme", tree(9)
    ids = tokenizer.encode(text)[0]
    length = {"prompt_length": len(ids)} if kind is Prompt else {"prefix_length": len(ids)}
    module = kind(init="text", init_text=text, **length).attach(load_model(bases[architecture], None), context(tokenizer))
    found = log_probs(TreeModel(module, layout).eval(), [example])
    whole = torch.tensor([[*ids, *example.tokens.tolist()]])
    logits = load_model(bases[architecture], None)(input_ids=whole).logits[0].log_softmax(-1)
    expected = logits[len(ids) : -1].gather(1, whole[0, len(ids) + 1 :, None]).squeeze(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [Prompt(prompt_length=5), Prefix(prefix_length=5)], ids=described)
def test_the_probe_notices_positions_that_do_not_count_the_prompt(
    method: SoftPrompt, bases: dict[str, Model], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = virtual.decoder_inputs

    def shifted(*arguments: Any) -> dict[str, Any]:
        inputs = original(*arguments)
        return {**inputs, "position_ids": (inputs["position_ids"] - 5).clamp(min=0)}

    monkeypatch.setattr("ftcli.layout.model.decoder_inputs", shifted)
    model = TreeModel(method.attach(load_model(bases["gpt2"], None), context(tokenizer)))
    with pytest.raises(RequestError, match="log-probabilities differ"):
        choose_layout(model, TREES, "auto", method.layouts, 64)


@pytest.mark.parametrize("method", [Prompt(prompt_length=5), Prefix(prefix_length=5)], ids=described)
def test_gradient_checkpointing_changes_no_gradient_in_the_forest(
    method: SoftPrompt, bases: dict[str, Model], tokenizer: Tokenizer
) -> None:
    gradients = []
    for is_on in (False, True):
        module = method.attach(load_model(bases["llama"], None), context(tokenizer))
        model = TreeModel(module, "forest").train()
        if is_on:
            module.get_base_model().activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        log_probs(model, TREES).mean().backward()
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("method", [Prompt(prompt_length=5), Prefix(prefix_length=5), Prefix(prefix_length=14)], ids=described)
def test_greedy_answers_are_the_likeliest_tokens_teacher_forced(
    method: SoftPrompt, architecture: str, bases: dict[str, Model], tokenizer: Tokenizer
) -> None:
    """Prompts of ragged lengths in one batch, so that padding in the wrong place shows; streams alike."""
    module = method.attach(load_model(bases[architecture], None), context(tokenizer)).eval()
    answers = generate(module, tokenizer, PROMPTS, max_new_tokens=8)
    model = TreeModel(module).eval()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = list(prompt_ids(tokenizer, prompt))
        assert answer.tokens
        for token in answer.tokens:
            assert next_token(model, ids) == token
            ids.append(token)
        assert "".join(stream(module, tokenizer, prompt, max_new_tokens=8)) == answer.text


@pytest.mark.parametrize("window", [None, 6])
def test_the_one_kernel_for_all_segments_sees_the_prefix_and_the_root(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU computes, with its kernel replaced by plain attention over the offsets it is given."""
    from torch.nn.functional import scaled_dot_product_attention

    from ftcli.layout import attention

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: Any, key_starts: Any, *_: Any, **options: Any) -> Any:
        parts = []
        for segment in range(len(starts) - 1):
            q = query[starts[segment] : starts[segment + 1]].transpose(0, 1)
            k, v = (x[key_starts[segment] : key_starts[segment + 1]].transpose(0, 1) for x in (key, value))
            left = options["window_size"][0]
            mask = attention._branch_mask(q.shape[1], k.shape[1], None if left < 0 else left + 1, q.device)
            parts.append(scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=options["scale"], enable_gqa=True))
        return torch.cat([part[0].transpose(0, 1) for part in parts])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    torch.manual_seed(0)
    forest = attention.Forest((3, 4, 2, 5), ((), (0,), (0, 1), ()), torch.device("cpu"))
    prefix = ((torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)),)
    for trees, before in ((forest.hung_on(4), 4), (attention.Forest(forest.lengths, forest.ancestors, forest.device, prefix), 0)):
        query = torch.randn(1, 4, 14 + before, 8)
        key, value = torch.randn(1, 2, 14 + before, 8), torch.randn(1, 2, 14 + before, 8)
        module = torch.nn.Module()
        module.layer_idx = 0  # type: ignore[assignment]
        expected, _ = attention.forest_attention(module, query, key, value, None, scaling=0.3, forest=trees, sliding_window=window)
        if trees.prefix:
            key, value = attention._after_prefix(module, key, value, trees)
        found = attention._attend_varlen(query, key, value, trees, 0.3, window)
        torch.testing.assert_close(found, expected)


def test_the_context_has_room_for_fewer_tokens_after_a_prompt(bases: dict[str, Model], tokenizer: Tokenizer) -> None:
    plain = load_model(bases["gpt2"], None)
    assert context_length(plain) == 96
    module = Prompt(prompt_length=90).attach(plain, context(tokenizer)).eval()
    assert context_length(module) == 6
    assert len(generate(module, tokenizer, ["abc"], max_new_tokens=50)[0].tokens) <= 2  # a beginning token and three letters
    with pytest.raises(RequestError, match="7 tokens leave no room for an answer in a context of 6"):
        generate(module, tokenizer, ["abcdef"], max_new_tokens=5)
    with module.disable_adapter():  # type: ignore[operator]
        assert context_length(module) == 96


def test_starts_are_what_they_are_called_and_depend_on_the_seed_alone(bases: dict[str, Model], tokenizer: Tokenizer) -> None:
    def start(method: Prompt, seed: int = 5, disturbance: int = 0) -> torch.Tensor:
        torch.manual_seed(disturbance)
        module: Any = method.attach(load_model(bases["llama"], None), context(tokenizer, seed))
        return module.prompt_encoder["default"].embedding.weight.detach()

    base = load_model(bases["llama"], None)
    table = base.get_input_embeddings().weight
    sampled = start(Prompt(prompt_length=6))
    rows = [(table == row).all(dim=1).nonzero().item() for row in sampled]
    assert len(set(rows)) == 6
    assert not set(rows) & set(tokenizer.backend.get_added_tokens_decoder())
    assert torch.equal(sampled, start(Prompt(prompt_length=6), disturbance=1))
    assert not torch.equal(sampled, start(Prompt(prompt_length=6), seed=6))
    random = start(Prompt(prompt_length=40, init="random"))
    assert 0.8 < float(random.std() / table.std()) < 1.2
    repeated = start(Prompt(prompt_length=5, init="text", init_text="ab"))
    assert torch.equal(repeated, embedded(base, tokenizer.encode("ababa")[0]))
    from_data = start(Prompt(prompt_length=3, init="labels"))  # the context's answers: [5, 6] and [7]
    torch.testing.assert_close(from_data[:2], torch.stack([table[5:7].mean(dim=0), table[7]]))
    named = start(Prompt(prompt_length=2, init="labels", init_labels=("yes", "no", "cut off")))
    torch.testing.assert_close(named[0], embedded(base, tokenizer.encode("yes")[0]).mean(dim=0))


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"init": "text"}, Prompt, "belong together"),
        ({"init_text": "a"}, Prompt, "belong together"),
        ({"init_labels": ("a",)}, Prompt, "with `init: labels` only"),
        ({"init": "text", "init_text": "a", "ensemble": 2}, Prompt, "all start from the same text"),
        ({"init": "data", "ensemble": 2}, Prefix, "all start from the same data"),
        ({"init": "data", "reparametrise": 8}, Prefix, "use init `random`"),
        ({"encoder_layers": 3}, PTuning, "`encoder: lstm` only"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, Any], kind: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        kind(**fields)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [("mamba", "`mamba` has no place for a prefix: it does not keep keys and values"), ("deepseek_v3", "of different shapes")],
)
def test_a_model_without_a_place_for_a_prefix_is_refused_and_takes_a_prompt(
    architecture: str, message: str, bases: dict[str, Model], tokenizer: Tokenizer
) -> None:
    with pytest.raises(RequestError, match=message):
        Prefix().attach(load_model(bases[architecture], None), context(tokenizer))
    method = Prompt(prompt_length=5)
    model = TreeModel(method.attach(load_model(bases[architecture], None), context(tokenizer)))
    assert choose_layout(model, TREES, "auto", method.layouts, 64).layout == "rows"


def test_an_adapter_of_another_base_is_refused(bases: dict[str, Model], tokenizer: Tokenizer, tmp_path: Path) -> None:
    method = Prefix(prefix_length=3)
    method.save(method.attach(load_model(bases["llama"], None), context(tokenizer)), tmp_path)
    with pytest.raises(RequestError, match=r"the adapter cannot be loaded|does not fit the model"):
        method.load(load_model(bases["qwen3"], None), tmp_path)
    with pytest.raises(RequestError, match=r"cannot read adapter_config\.json"):
        method.load(load_model(bases["llama"], None), tmp_path / "nowhere")


def test_merging_is_refused_with_what_to_do_instead(bases: dict[str, Model], tokenizer: Tokenizer) -> None:
    for method in (Prompt(prompt_length=2), Prefix(prefix_length=2), PTuning(prompt_length=2)):
        module = method.attach(load_model(bases["llama"], None), context(tokenizer))
        with pytest.raises(RequestError, match=r"changes no weight(.|\n)*keep the `adapter` folder"):
            method.merge(module)


def test_a_bfloat16_base_keeps_a_float32_prompt(bases: dict[str, Model], tokenizer: Tokenizer) -> None:
    for method in (Prompt(prompt_length=4), Prefix(prefix_length=4)):
        base = load_model(bases["llama"], None, dtype="bfloat16")
        model = TreeModel(method.attach(base, context(tokenizer)))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert choose_layout(model, TREES, "auto", method.layouts, 64).layout == "forest"
        assert generate(model.module, tokenizer, PROMPTS, max_new_tokens=3)


# ---- whole runs --------------------------------------------------------------------------------------------------------------


def recipe(folder: Path, method: dict[str, Any], name: str = "run", **changes: Any) -> Path:
    """A few steps on the built-in base and orders."""
    document = {
        "version": 1,
        "name": name,
        "model": {"base": "builtin:tiny"},
        "data": {
            "train": [{"source": {"kind": "builtin", "name": "orders"}, "limit": 12}],
            "holdout": 0.0,
            "max_length": 512,
        },
        "method": method,
        "train": {"steps": 4, "global_batch_size": 3},
        "every": {"log": 1, "save": 2},
        "output": str(folder / name),
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    "method",
    [
        {"kind": "prompt", "prompt_length": 4, "ensemble": 2},
        {"kind": "prefix", "prefix_length": 4},
        {"kind": "p_tuning", "prompt_length": 4, "encoder": "lstm", "encoder_size": 8},
    ],
    ids=lambda method: str(method["kind"]),
)
def test_resumed_run_equals_uninterrupted_run(method: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.training.hooks import Checkpoint

    assert run(["train", str(recipe(tmp_path, method, "whole"))]) == 0
    original = Checkpoint.after_step

    def after_step(self: Checkpoint, progress: Any, batches: Any, result: Any) -> None:
        if progress.step == 3:
            self.stop.handle(signal.SIGTERM, None)
        original(self, progress, batches, result)

    monkeypatch.setattr(Checkpoint, "after_step", after_step)
    parts = recipe(tmp_path, method, "parts")
    assert run(["train", str(parts)]) == 75
    assert run(["generate", str(tmp_path / "parts"), "two teas", "--max-new-tokens", "2"]) == 0  # from its checkpoint
    monkeypatch.setattr(Checkpoint, "after_step", original)
    assert run(["train", str(parts), "--resume"]) == 0
    weights = {path.relative_to(tmp_path / "whole"): load_file(path) for path in (tmp_path / "whole/adapter").rglob("*.safetensors")}
    assert weights
    for name, tensors in weights.items():
        assert torch.equal(load_file(tmp_path / "parts" / name)["prompt_embeddings"], tensors["prompt_embeddings"])


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ({"kind": "prefix", "prefix_length": 600}, {}, "600 virtual tokens before examples of at most 512"),
        ({"kind": "prefix"}, {"train": {"layout": "rows", "gradient_checkpointing": True}}, "drops the prefix in layout `rows`"),
    ],
)
def test_a_recipe_without_room_for_the_prompt_is_refused(
    method: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", str(recipe(tmp_path, method, **changes))]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_examples_that_fit_without_the_prompt_and_not_with_it_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = {"init": {"architecture": "llama", "config": {**config, "max_position_embeddings": 300}}, "tokenizer": "builtin:tiny"}
    assert run(["train", str(recipe(tmp_path, {"kind": "prompt", "prompt_length": 1}, "fits", model=model))]) == 0
    assert run(["train", str(recipe(tmp_path, {"kind": "prompt", "prompt_length": 299}, model=model))]) == 2
    assert "299 virtual tokens leave no room for an example: the model sees 300 tokens at once" in capsys.readouterr().err
    assert run(["train", str(recipe(tmp_path, {"kind": "prompt", "prompt_length": 280}, model=model))]) == 2
    assert "and the model sees 20 at once after 280 virtual ones" in capsys.readouterr().err


@pytest.mark.parametrize("method", [{"kind": "prompt"}, {"kind": "prefix"}, {"kind": "p_tuning"}], ids=lambda method: str(method["kind"]))
def test_with_its_defaults_it_learns_eight_sentences_on_the_builtin_base(method: dict[str, Any], tmp_path: Path) -> None:
    """A prompt of twenty tokens cannot hold eight sentences word by word: it has to halve what the base needs for them."""
    from tests.laws.registered import make_bench

    bench = make_bench(tmp_path)
    bench = type(bench)(bench.recipe.model_copy(update={"model": Model(base="builtin:tiny")}), bench.data)
    from ftcli.recipe.load import load_recipe

    chosen = load_recipe(recipe(tmp_path, method)).recipe.method
    losses = bench.with_train(lr=chosen.lr_at(192)).run(chosen, 40).losses
    assert losses[-1] < 0.5 * losses[0]
