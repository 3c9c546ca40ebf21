"""Law 9: every recipe field changes something observable, and a field without an entry in the table below fails.

An entry is a group: settings, what of them can be seen, and for each field another value. The observable is computed for the
settings as they are and with the one value changed, and has to differ. Observables are what a user gets: examples and their
order, learning rates, updates, losses, answers, files, and errors.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel, ValidationError

from ftcli.data.formats import Format
from ftcli.data.formats.chat import Chat
from ftcli.data.formats.completion import Completion
from ftcli.data.formats.instruction import Instruction
from ftcli.data.formats.label import Label
from ftcli.data.formats.text import Text
from ftcli.data.look import look
from ftcli.data.mixtures import Mixture
from ftcli.data.mixtures.balanced import Balanced
from ftcli.data.mixtures.passes import Passes
from ftcli.data.mixtures.replay import Replay, ShareSchedule
from ftcli.data.mixtures.shares import Shares
from ftcli.data.mixtures.stream import Stream
from ftcli.data.order import Order
from ftcli.data.prepare import Prepared, prepare
from ftcli.data.settings import Data, EvaluationSource, Generate, TrainSource
from ftcli.data.sources import Source
from ftcli.data.sources.builtin import Builtin
from ftcli.data.sources.file import File
from ftcli.data.sources.hub import Hub
from ftcli.data.sources.own_text import OwnText
from ftcli.errors import FtcliError
from ftcli.evaluation.answers import read_questions, score_answers
from ftcli.methods import Method
from ftcli.methods.adalora import Adalora
from ftcli.methods.adamix import Adamix
from ftcli.methods.bitfit import Bitfit
from ftcli.methods.bottleneck_adapter import BottleneckAdapter, Drop, FixedDrop, NoDrop, RandomDrop
from ftcli.methods.context import AttachContext
from ftcli.methods.features import Features
from ftcli.methods.freeze import Freeze
from ftcli.methods.full import Full
from ftcli.methods.head_only import HeadOnly
from ftcli.methods.hft import Hft
from ftcli.methods.ia3 import Ia3
from ftcli.methods.lisa import Lisa
from ftcli.methods.lora import Lora
from ftcli.methods.norms import Norms
from ftcli.methods.p_tuning import PTuning
from ftcli.methods.peft import Peft
from ftcli.methods.prefix import Prefix
from ftcli.methods.prompt import Prompt
from ftcli.methods.qlora import Qlora
from ftcli.metrics import Metric
from ftcli.metrics.bleu import Bleu
from ftcli.metrics.chrf import Chrf
from ftcli.metrics.exact_match import ExactMatch
from ftcli.metrics.json_match import JsonMatch
from ftcli.metrics.json_valid import JsonValid
from ftcli.metrics.number_match import NumberMatch
from ftcli.metrics.regex_match import RegexMatch
from ftcli.metrics.rouge import Rouge
from ftcli.metrics.token_f1 import TokenF1
from ftcli.models.add_tokens import AddTokens
from ftcli.models.grow import Grow
from ftcli.models.grow.blocks import GrowBlocks
from ftcli.models.grow.depth import GrowDepth
from ftcli.models.grow.experts import GrowExperts
from ftcli.models.grow.width import GrowWidth
from ftcli.models.load import load_config, load_model
from ftcli.models.quantisation import Quantization
from ftcli.models.rope import Rope, RopeDynamic, RopeLinear, RopeLlama3, RopeYarn
from ftcli.models.settings import Init, Model
from ftcli.models.tokenizer import Tokenizer, load_tokenizer
from ftcli.objectives import Objective
from ftcli.objectives.causal_lm import CausalLM
from ftcli.objectives.classification import Classification, OutOfScope
from ftcli.objectives.regularize import Regularizer
from ftcli.objectives.regularize.ewc import EWC, FisherRows
from ftcli.objectives.regularize.kl import KL, TopK
from ftcli.objectives.regularize.l2_sp import L2SP
from ftcli.optim.optimizers import Optimizer
from ftcli.optim.optimizers.adafactor import Adafactor
from ftcli.optim.optimizers.adamw import AdamW
from ftcli.optim.optimizers.adamw8bit import AdamW8bit
from ftcli.optim.optimizers.apollo import Apollo
from ftcli.optim.optimizers.galore import GaLore
from ftcli.optim.optimizers.lion import Lion
from ftcli.optim.optimizers.muon import Muon
from ftcli.optim.optimizers.sgd import SGD
from ftcli.optim.schedules import Schedule
from ftcli.optim.schedules.constant import Constant
from ftcli.optim.schedules.cosine import Cosine
from ftcli.optim.schedules.infinite import Infinite
from ftcli.optim.schedules.linear import Linear
from ftcli.optim.schedules.rewarm import Rewarm
from ftcli.optim.schedules.wsd import WSD
from ftcli.recipe.init_from import InitFrom
from ftcli.recipe.load import load_recipe
from ftcli.recipe.recipe import Recipe
from ftcli.recipe.train import EarlyStopping, Every, Train
from ftcli.reporting.live import Reporter
from ftcli.training.assemble import assemble_data, assemble_learner, assemble_model, cache_folder, load_base, make_accelerator, settled
from ftcli.training.hooks import Evaluate, Metrics
from ftcli.training.loop import Progress
from ftcli.training.own_text import write_own_text
from ftcli.training.run import run_folder, run_recipe
from ftcli.training.step import optimizer_step
from tests.laws.classification_fields import called_outside, fitted, fitted_mlp, held_out, posed, scored
from tests.laws.registered import Bench, make_bench, union_members
from tests.laws.regularize_fields import held, held_by_cache, held_by_rows, pulled_head
from tests.tiny_chat_model import write_tiny_chat_model

STEPS = 20


@dataclass
class World:
    """What observables need: a folder, the built-in tokenizer, a recipe with its data prepared, and a trained-looking model."""

    folder: Path
    tokenizer: Tokenizer
    bench: Bench
    kept: dict[Any, Any] = field(default_factory=dict)

    def as_is(self, group: Group) -> Any:
        """What is seen of a group's settings with nothing changed, computed once."""
        key = (group.spec, group.seen)
        if key not in self.kept:
            self.kept[key] = group.seen(self, group.settings(self))
        return self.kept[key]

    def model(self) -> Any:
        """A small random model, made once."""
        if "model" not in self.kept:
            self.kept["model"] = self.bench.parts(Full())[1].module
        return self.kept["model"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("fields")
    return World(folder, load_tokenizer("builtin:tiny"), make_bench(folder, lr=1e-2))


# ---- observables: pure functions of settings -------------------------------------------------------------------------------


def updates(world: World, optimizer: Any) -> Any:
    """The weights after three real steps."""
    module = world.bench.with_train(optimizer=optimizer).run(Full(), 3).module
    return [parameter.detach().numpy().tobytes() for parameter in module.parameters()]


def factors(world: World, schedule: Any) -> list[float]:
    """The learning rate of every step, as a share of the peak."""
    return [schedule.factor_at(step, STEPS) for step in range(1, STEPS + 1)]


ANSWERS = (("Yes", " yes "), ("yes ", "yes"), ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}'), ('{"a": 1, "b": 3}', '{"b": 2, "a": 1}'))
NUMBERS = (("so #### 7 of 9", "#### 7"), ("it is 7.2", "7"), ("it is 7", "7.0"))
SENTENCES = (("Answer: The dogs ran", "Dogs, ran"), ("a tall (DOG) runs home today", "a tall (dog) run home today."))


def scores(world: World, metric: Any) -> list[float]:
    """Of answers that differ from their references in case, spaces, order, value."""
    return [metric.score(answer, reference) for answer, reference in (*ANSWERS, *NUMBERS, *SENTENCES)]


def order_of(world: World, mixture: Any) -> Any:
    """The examples of an epoch's first four steps over a small source of long examples and a large one of short ones."""
    order = Order([5, 40], [90.0, 10.0], [1.0, 0.5], mixture, roles=["new", "replay"], global_batch_size=8, steps=4, seed=1)
    return [order.examples_at(step) for step in range(1, 5)], order.examples_per_epoch


def replayed(world: World, schedule: ShareSchedule) -> Any:
    """The examples of a run with this schedule."""
    return order_of(world, Replay(share_of_new=schedule))


def judged(world: World, settings: EarlyStopping) -> Any:
    """Where a run stops whose loss falls, then hardly, then not at all."""
    evaluate = Evaluate(1, lambda step: {}, Metrics(world.folder / "none.jsonl", None), settings, print)  # type: ignore[arg-type]
    progress = Progress(num_steps=99)
    for step, loss in enumerate([3.0, 2.0, 1.99, 1.98, 1.98, 1.98, 1.98, 1.98], start=1):
        progress.step = step
        evaluate.judge(progress, {"source": {"loss": loss, "targets": 1, "role": "target"}})
        if progress.stop_reason is not None:
            return step, progress.best_step
    return None, progress.best_step


# ---- observables: rows and examples ----------------------------------------------------------------------------------------


def turns(word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{word}?"}, {"role": "assistant", "content": f"{word}!"}]


TOOL = [{"type": "function", "function": {"name": "count", "parameters": {}}}]
ROW: dict[str, Any] = {
    "messages": turns("eggs") + turns("milk"),
    "dialogue": turns("bread"),
    "system": "Be brief.",
    "persona": "Be kind.",
    "tools": TOOL,
    "functions": [{"type": "function", "function": {"name": "weigh", "parameters": {}}}],
    "weight": 0.5,
    "importance": 2.0,
    "prompt": "1 + 1 =",
    "question": "2 + 2 =",
    "completion": " 2",
    "answer": " 4",
    "instruction": "Add the numbers",
    "task": "Count the numbers",
    "input": "1 and 1",
    "context": "2 and 2",
    "output": "2",
    "result": "4",
    "label": "sum",
    "mood": "dry",
    "second": "3 + 3 =",
    "text": "One egg.",
    "body": "Two eggs.",
}
ROW_OF_MESSAGES = {**ROW, "prompt": turns("eggs")[:1], "completion": turns("eggs")[1:]}


def example(world: World, settings: Any) -> Any:
    """What a row with a column for everything becomes."""
    return settings.example(ROW, world.tokenizer, "row 1")


def example_of_messages(world: World, settings: Any) -> Any:
    """The same where prompt and completion are lists of messages."""
    return settings.example(ROW_OF_MESSAGES, world.tokenizer, "row 1")


def rows(world: World, source: Any) -> Any:
    """The first rows of a source, and what the hub is asked for; there is no hub here, so a stand-in answers."""
    import datasets

    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return datasets.Dataset.from_list([{"text": "a"}])

    for name, text in {"a": "One.\nTwo.\n\nThree.\n", "b": "Four.\n"}.items():
        (world.folder / f"{name}.txt").write_text(text)
    if isinstance(source, File):
        source = source.model_copy(update={"path": str(world.folder / Path(source.path).name)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        return said_or(lambda: [row for _, row in itertools.islice(source.rows(), 3)]), asked


def written(world: World, settings: OwnText) -> str:
    """What a small random model writes itself."""
    path = world.folder / "own.jsonl"
    write_own_text(world.model(), world.tokenizer, settings, path, None)
    return path.read_text()


def said_or(act: Callable[[], Any]) -> Any:
    """What `act` gives, or what ftcli says when it refuses."""
    try:
        return act()
    except FtcliError as error:
        return str(error)


# ---- observables: prepared data --------------------------------------------------------------------------------------------


def long_and_short_rows(world: World) -> str:
    """A file of short texts with a long chat's length among them, and a chat of the same kind."""
    path = world.folder / "mixed.jsonl"
    texts = [f"{number}{letter} " * (60 if number == 2 else 4) for letter in "ab" for number in range(12)]
    path.write_text("".join(json.dumps({"prompt": text, "completion": f"{index} {text[:2]}"}) + "\n" for index, text in enumerate(texts)))
    return str(path)


def prepared(world: World, data: Data) -> Prepared:
    return prepare(data, world.tokenizer, cache_folder=cache_folder())


def trees(world: World, data: Data) -> Any:
    """The tokens and target weights of all trees, trained on and held out, or why there are none."""

    def made() -> Any:
        done = prepared(world, data)
        found = [[store.tree(index) for index in range(len(store))] for store in (*done.train, *done.evaluation)]
        return [[(tree.tokens.tolist(), tree.spans.tolist()) for tree in trees] for trees in found]

    return said_or(made)


def with_train_source(world: World, source: TrainSource) -> Data:
    """Data of this source and another."""
    return Data(train=(source, TrainSource(source=Builtin(name="orders"), limit=3)), max_length=512)


def train_trees(world: World, source: TrainSource) -> Any:
    return trees(world, with_train_source(world, source))


def train_look(world: World, source: TrainSource) -> Any:
    """What `ftcli check --fast --json` says of it."""
    return [found.to_json() for found in look(with_train_source(world, source), world.tokenizer)]


def train_order(world: World, source: TrainSource) -> Any:
    """The examples of the first steps of a run on it and another source."""
    data = with_train_source(world, source)
    recipe = world.bench.recipe.model_copy(update={"data": data})
    order = assemble_data(recipe, None).order
    return [order.examples_at(step) for step in range(1, 4)]


def evaluation_report(world: World, source: EvaluationSource) -> Any:
    """Name, role and examples of the source, as evaluations report them."""
    data = Data(train=(TrainSource(source=Builtin(name="orders"), limit=3),), evaluation=(source,), max_length=512)
    return [(store.name, store.role, len(store)) for store in prepared(world, data).evaluation]


def answers(world: World, settings: Generate) -> Any:
    """Generated answers and their scores, by a small random model."""
    data = Data(
        train=(TrainSource(source=Builtin(name="orders"), limit=3),),
        evaluation=(EvaluationSource(source=Builtin(name="orders", split="test"), limit=3, generate=settings),),
        max_length=512,
    )
    model = world.model()
    questions = read_questions(model, prepared(world, data).evaluation[0], world.tokenizer, settings.limit)
    return score_answers(model, world.tokenizer, questions, settings, None)


def processes(world: World, data: Data) -> int:
    """The most processes that tokenise at the same time."""

    class Counting:
        most = 0

        def update(self, done: int, total: int | None, what: str) -> None:
            self.most = max(self.most, len(multiprocessing.active_children()))

    path = world.folder / f"rows-{data.workers}.jsonl"
    path.write_text("".join(json.dumps({"text": f"{data.workers} {number}"}) + "\n" for number in range(4001)))
    counting = Counting()
    source = TrainSource(source=File(path=str(path)))
    prepare(data.model_copy(update={"train": (source,)}), world.tokenizer, cache_folder=cache_folder(), progress=counting)
    return counting.most


# ---- observables: models ---------------------------------------------------------------------------------------------------


def config(world: World, model: Model) -> Any:
    """The configuration of the model that is loaded, or why none is."""
    return said_or(lambda: load_config(model, world.tokenizer).to_dict())


def initial(world: World, init: Init) -> Any:
    """The configuration of a model with random weights."""
    return config(world, Model(init=init, tokenizer="builtin:tiny"))


def loaded(world: World, model: Model) -> Any:
    """Attention and dtype of the model in memory."""
    recipe = world.bench.recipe.model_copy(update={"model": model, "method": Full()})
    found = load_base(recipe, world.tokenizer, make_accelerator(recipe, None).device)
    return found.config._attn_implementation, found.dtype


def rendered(world: World, model: Model) -> Any:
    """A chat as the model's tokenizer sees it."""
    write_tiny_chat_model(world.folder / "talker")
    if model.tokenizer is not None:
        model = model.model_copy(update={"tokenizer": str(world.folder / Path(model.tokenizer).name)})
    tokenizer = model.load_tokenizer()
    text = tokenizer.render(turns("eggs"))
    return text, tokenizer.encode(text)[0]


def fetched(world: World, model: Model) -> Any:
    """The folder of a hub id's revision, in a cache that holds two."""
    from huggingface_hub import constants

    from ftcli.models.locate import model_folder

    cache = world.folder / "hub"
    for name in ("main", "v2"):
        commit = ("1" if name == "main" else "2") * 40
        (cache / "models--own--model" / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "models--own--model" / "refs" / name).write_text(commit)
        (cache / "models--own--model" / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        (cache / "models--own--model" / "snapshots" / commit / "config.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        return model_folder(str(model.base), model.revision, weights=False).name


def with_code(world: World, model: Model) -> Any:
    """The configuration class of a model folder that brings its own code."""
    from transformers import dynamic_module_utils

    folder = world.folder / "own-code"
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(
        "from transformers import PretrainedConfig\n\n\nclass OwnConfig(PretrainedConfig):\n    model_type = 'own-code'\n"
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "own-code", "auto_map": {"AutoConfig": "own.OwnConfig"}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(world.folder / "modules"))
        return said_or(lambda: type(load_config(model.model_copy(update={"base": str(folder)}))).__name__)


def grown(world: World, growth: Any) -> Any:
    """The weights of the embedded model, grown."""
    found = load_model(Model(base="builtin:tiny", grow=growth), world.tokenizer, seed=1)
    return [(name, hash(tensor.numpy().tobytes())) for name, tensor in found.state_dict().items()], found.config.to_dict()


def learning_grown(world: World, method: Freeze) -> Any:
    """What trains of a grown model, and the losses."""
    model = world.bench.recipe.model.model_copy(update={"grow": GrowBlocks(num_blocks=1)})
    return learning(replace(world, bench=replace(world.bench, recipe=world.bench.recipe.model_copy(update={"model": model}))), method)


def with_new_tokens(world: World, settings: AddTokens) -> Any:
    """The tokens of a run, the rows they begin with, and what trains beside an adapter, or why there are none."""
    for name in ("boats", "clocks"):
        (world.folder / f"{name}.txt").write_text(f"green {name}\n {name}\n")
    if settings.file is not None:
        settings = settings.model_copy(update={"file": str(world.folder / Path(settings.file).name)})

    def made() -> Any:
        model = Model(base="builtin:tiny", add_tokens=settings)
        recipe = world.bench.recipe.model_copy(update={"model": model, "method": Lora(rank=2, target_modules=("q_proj",))})
        data = assemble_data(recipe, None)
        module = assemble_model(settled(recipe, data), data, make_accelerator(recipe, None)).module
        rows = module.get_input_embeddings().weight[3072:]
        trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        return [data.tokenizer.decode([token]) for token in range(3072, 3072 + len(rows))], rows.tolist(), trained

    return said_or(made)


def positions(world: World, rope: Any) -> Any:
    """The configuration with scaled positions."""
    return config(world, Model(base="builtin:tiny", rope=rope))


# ---- observables: training -------------------------------------------------------------------------------------------------


def learning(world: World, method: Any) -> Any:
    """What trains, and the losses of four steps."""
    steps = world.bench.run(method, 4)
    return [name for name, parameter in steps.module.named_parameters() if parameter.requires_grad], steps.losses


def learning_with_drop(world: World, drop: Any) -> Any:
    """The same of an adapter in three layers, twice the steps: what is drawn may be the same for some."""
    init = world.bench.recipe.model.init
    assert init is not None
    deeper = init.model_copy(update={"config": {**init.config, "num_hidden_layers": 3}})
    recipe = world.bench.recipe.model_copy(update={"model": world.bench.recipe.model.model_copy(update={"init": deeper})})
    steps = replace(world.bench, recipe=recipe).run(BottleneckAdapter(drop=drop), 8)
    return [name for name, parameter in steps.module.named_parameters() if parameter.requires_grad], steps.losses


def with_biases(world: World, method: Bitfit) -> Any:
    """What trains in a model without biases."""
    from ftcli.methods.context import AttachContext
    from ftcli.models.load import load_model

    base = load_model(Model(base="builtin:tiny"), None)
    return said_or(lambda: method.what_trains(method.attach(base, AttachContext(seed=1))))


def ranks_left(world: World, method: Adalora) -> list[int]:
    """Singular values that are left after each of ten steps."""
    from ftcli.methods.rank_budget import adalora_layers

    module = world.bench.parts(method)[1].module
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    found = []
    for step in range(1, 11):
        generator = torch.Generator().manual_seed(step)
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.1 * parameter.grad)
        method.after_update(module, step, 10)
        found.append(sum(int(layer.lora_E["default"].count_nonzero()) for _, layer in adalora_layers(module)))
    return found


def begun(world: World, init_from: InitFrom) -> Any:
    """What the first step of a run trains, and with which loss, when it begins from one of two earlier ones."""
    from ftcli.methods.parameter_groups import trained_parameters

    for name, seed in (("first", 5), ("second", 6)):
        if not (world.folder / name).exists():
            base = load_base(world.bench.recipe, world.tokenizer, make_accelerator(world.bench.recipe, None).device)
            module = Lora(rank=2).attach(base, AttachContext(seed=seed))
            with torch.no_grad():
                for _, parameter in trained_parameters(module):
                    parameter.add_(0.1)
            Lora(rank=2).save(module, world.folder / name)
    path = str(world.folder / Path(init_from.path).name)
    recipe = world.bench.recipe.model_copy(
        update={"method": Lora(rank=2), "init_from": init_from.model_copy(update={"path": path}), "model": world.bench.recipe.model}
    )
    module = assemble_model(recipe, world.bench.data, make_accelerator(recipe, None)).module
    return {name: parameter.detach().numpy().tobytes() for name, parameter in trained_parameters(module)}


def branched(world: World, init_from: InitFrom) -> list[int]:
    """The steps that a run makes which begins from the second step of another."""
    output, data = world.folder / "branched", world.bench.recipe.data

    def trained(name: str, **changes: Any) -> list[int]:
        train = world.bench.recipe.train.model_copy(update={"steps": 4})
        every = Every(log=1, save=2)
        common = {"data": data, "train": train, "every": every, "method": Full(), "output": str(output / name)}
        recipe = world.bench.recipe.model_copy(update={**common, **changes})
        shutil.rmtree(output / name, ignore_errors=True)
        with (world.folder / "words").open("w") as words:
            run_recipe(replace(load_recipe(world.folder / "bench.yaml"), recipe=recipe), Reporter(stream=words))
        return [json.loads(line)["step"] for line in (output / name / "metrics.jsonl").read_text().splitlines()]

    trained("trunk")
    path = str(output / "trunk" / "checkpoints" / "step-000002")
    return trained("branch", init_from=init_from.model_copy(update={"path": path}))


def kept_layers(world: World, method: Freeze) -> int:
    """How many layers are computed once an example."""
    return method.frozen_layers(world.bench.parts(method)[1].module)


def quantized_learning(world: World, quantize: Quantization) -> Any:
    return learning(world, Qlora(rank=4, quantize=quantize))


def with_method(world: World, train: Train) -> Recipe:
    return world.bench.recipe.model_copy(update={"train": train, "method": Full()})


def losses(world: World, train: Train) -> Any:
    """The losses of three real steps."""
    bench = Bench(with_method(world, train), world.bench.data)
    return bench.run(Full(), 3).losses


def steps_seen(world: World, train: Train) -> Any:
    """How many steps there are, and the examples of each."""
    order = assemble_data(with_method(world, train), None).order
    return [order.examples_at(step) for step in range(1, order.num_steps + 1)]


def micro_batches(world: World, train: Train) -> Any:
    """Tokens of each forward pass of a step."""
    recipe = with_method(world, train)
    _, parts = Bench(recipe, world.bench.data).parts(Full())
    _, batches = assemble_learner(recipe, world.bench.data, parts, make_accelerator(recipe, None))
    return [batch.num_tokens for batch in batches.at(1).micro_batches]


def assembled(world: World, train: Train) -> Any:
    """Layout, compilation, and how often a step runs the first layer: recomputing runs it twice."""
    from ftcli.layout.model import inner_model

    recipe = with_method(world, train)
    accelerator = make_accelerator(recipe, None)
    parts = assemble_model(recipe, world.bench.data, accelerator)
    decoder = inner_model(parts.module).base_model
    is_compiled = decoder._compiled_call_impl is not None
    decoder._compiled_call_impl = None  # not run here: compiling takes a minute
    calls: list[int] = []
    decoder.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    learner, batches = assemble_learner(recipe, world.bench.data, parts, accelerator)
    learner.model.train()
    optimizer_step(learner, batches.at(1), 1.0)
    return parts.layout.layout, is_compiled, len(calls)


def device(world: World, train: Train) -> Any:
    """Where it trains, or why it cannot."""
    return said_or(lambda: make_accelerator(with_method(world, train), None).device)


def hooks(world: World, every: Every) -> Any:
    """What a whole run logged, when it evaluated, and the checkpoints it kept."""
    evaluation = EvaluationSource(source=Builtin(name="stories", split="test"), limit=1)
    data = world.bench.recipe.data.model_copy(update={"evaluation": (evaluation,), "max_length": 256})
    train = world.bench.recipe.train.model_copy(update={"steps": 8})
    output = str(world.folder / "run")
    recipe = world.bench.recipe.model_copy(update={"data": data, "train": train, "every": every, "output": output, "method": Full()})
    shutil.rmtree(output, ignore_errors=True)
    with (world.folder / "words").open("w") as words:
        run_recipe(replace(load_recipe(world.folder / "bench.yaml"), recipe=recipe), Reporter(stream=words))
    records = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    checkpoints = sorted(path.name for path in (Path(output) / "checkpoints").iterdir())
    return [(record["kind"], record["step"]) for record in records], checkpoints


def place(world: World, recipe: Recipe) -> Any:
    """Where the run goes."""
    return run_folder(recipe).path


def trackers(world: World, recipe: Recipe) -> Any:
    """Where metrics go, or which package is missing."""
    return said_or(lambda: make_accelerator(recipe, world.folder).log_with)


def loading(world: World, recipe: Recipe) -> Any:
    """The recipe itself."""
    return recipe.name


# ---- the table -------------------------------------------------------------------------------------------------------------

Settings = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Fields of one Spec that are seen in the same way."""

    spec: type[BaseModel]
    seen: Callable[[World, Any], Any]
    change: Settings
    """Another value for each field."""
    base: Settings | Callable[[World], Settings] = field(default_factory=dict)
    """What the other fields are."""

    def settings(self, world: World, **changes: Any) -> Any:
        values = self.base(world) if callable(self.base) else self.base
        written = {name: info.alias or name for name, info in self.spec.model_fields.items()}
        return self.spec(**{written.get(name, name): value for name, value in {**values, **changes}.items()})


LOW_RANK: Settings = {
    "rank": 8,
    "alpha": 16.0,
    "dropout": 0.5,
    "target_modules": ("q_proj",),
    "rank_pattern": {"q_proj": 2},
    "variant": "dora",
    "init": "pissa",
    "extra_trained_modules": ("norm",),
    "lora_plus_ratio": 16.0,
}
BOTTLENECK: Settings = {
    "preset": "pfeiffer",
    "mh_adapter": False,
    "output_adapter": False,
    "placement": "stream",
    "reduction_factor": {"0": 2.0, "default": 4.0},
    "non_linearity": "tanh",
    "init": "bert",
    "scaling": "learned",
    "gating": True,
    "dropout": 0.5,
    "leave_out": (1,),
    "norm_before": True,
    "norm_after": True,
}
LOW_RANK_GRADIENTS: Settings = {"rank": 2, "update_projection_every": 1, "scale": 0.5}
ADAM: Settings = {"betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 0.5}
WARM_UP: Settings = {"warmup_steps": 5, "warmup_ratio": 0.5}
ORDERS = Data(train=(TrainSource(source=Builtin(name="orders")),))
RECIPE: Settings = {"version": 1, "name": "a", "model": Model(base="builtin:tiny"), "data": ORDERS}


def mixed_lengths(world: World) -> Settings:
    """Data of one source, with rows longer than `max_length`."""
    return {"train": (TrainSource(source=File(path=long_and_short_rows(world))),), "max_length": 32, "on_overflow": "drop"}


TABLE = (
    Group(AdamW, updates, ADAM),
    Group(AdamW8bit, updates, ADAM),
    Group(Adafactor, updates, {"decay_rate": -0.1, "clip_threshold": 0.01, "weight_decay": 0.5}),
    Group(Apollo, updates, {**ADAM, **LOW_RANK_GRADIENTS}),
    Group(GaLore, updates, {**ADAM, **LOW_RANK_GRADIENTS}),
    Group(Lion, updates, {"betas": (0.5, 0.6), "weight_decay": 0.5}),
    Group(Muon, updates, {**ADAM, "momentum": 0.5, "nesterov": False, "ns_steps": 1}),
    Group(SGD, updates, {"momentum": 0.5, "nesterov": True, "weight_decay": 0.5}, base={"momentum": 0.9}),
    Group(Constant, factors, WARM_UP),
    Group(Linear, factors, {**WARM_UP, "min_lr_ratio": 0.5}),
    Group(Cosine, factors, {**WARM_UP, "min_lr_ratio": 0.5}),
    Group(WSD, factors, {**WARM_UP, "decay_steps": 10, "decay_ratio": 0.6, "shape": "sqrt", "min_lr_ratio": 0.5}),
    Group(
        Infinite,
        factors,
        {
            "warmup_steps": 5,
            "warmup_ratio": 0.5,
            "cooldown_steps": 2,
            "cooldown_ratio": 0.6,
            "constant_ratio": 0.3,
            "anneal_steps": 10,
            "anneal_ratio": 0.6,
            "anneal": "linear",
            "min_lr_ratio": 0.2,
            "begin": "constant",
        },
    ),
    Group(Rewarm, factors, {**WARM_UP, "cycles": 3, "peak_ratio": 0.5, "min_lr_ratio": 0.5}),
    Group(Rewarm, factors, {"start_ratio": 0.5}, base={"warmup_steps": 4}),
    Group(KL, held, {"weight": 2.0, "temperature": 3.0, "direction": "reverse", "on": "new", "teacher": "other"}),
    Group(TopK, held_by_cache, {"top_k": 2}),
    Group(L2SP, held, {"weight": 1.0, "decoupled": True}),
    Group(L2SP, pulled_head, {"head_weight": 0.5}),
    Group(EWC, held, {"weight": 30.0, "examples": 2, "labels": "data"}, base={"weight": 10.0}),
    Group(EWC, held, {"earlier": "second", "decay": 0.1}, base={"examples": 2, "earlier": "first"}),
    Group(FisherRows, held_by_rows, {}, base={"source": Builtin(name="stories")}),
    Group(Bleu, scores, {"tokenize": "char", "lowercase": True}),
    Group(Chrf, scores, {"word_order": 2, "lowercase": True}),
    Group(ExactMatch, scores, {"strip": False, "ignore_case": True, "normalise": ("case",)}),
    Group(JsonMatch, scores, {"by_field": True}),
    Group(JsonValid, scores, {}),
    Group(NumberMatch, scores, {"marker": "####", "tolerance": 0.5}),
    Group(RegexMatch, scores, {"pattern": r"\d", "normalise": ()}),
    Group(Rouge, scores, {"variant": "rouge2", "stemmer": True}),
    Group(TokenF1, scores, {"normalise": ()}),
    Group(Balanced, order_of, {"temperature": 1.0}),
    Group(Passes, order_of, {}),
    Group(Replay, order_of, {"accounting": "add"}),
    Group(ShareSchedule, replayed, {"first": 0.9, "to": 0.3, "shape": "cosine"}, base={"first": 0.1, "to": 0.9}),
    Group(Shares, order_of, {"unit": "tokens"}),
    Group(Stream, order_of, {"window": 7}),
    Group(EarlyStopping, judged, {"patience": 2, "min_improvement": 0.1}),
    Group(Chat, example, {"messages": "dialogue", "system": "persona", "tools": "functions", "weight": "importance", "turns": "last"}),
    Group(Completion, example, {"prompt": "question", "completion": "answer", "weight": "importance", "append_eos": False}),
    Group(Completion, example_of_messages, {"tools": "functions"}),
    Group(
        Instruction,
        example,
        {
            "instruction": "task",
            "input": "context",
            "output": "result",
            "system": "persona",
            "weight": "importance",
            "style": "plain",
        },
    ),
    Group(Text, example, {"text": "body", "weight": "importance", "append_eos": False}),
    Group(File, rows, {"path": "b.txt", "split": "line"}, base={"path": "a.txt"}),
    Group(Builtin, rows, {"name": "orders", "split": "test"}, base={"name": "stories"}),
    Group(
        Hub,
        rows,
        {"dataset": "own/other", "config": "large", "split": "test", "revision": "v2", "streaming": True},
        base={"dataset": "own/data"},
    ),
    Group(OwnText, rows, {}),
    Group(
        OwnText,
        written,
        {"tokens": 40, "max_length": 6, "temperature": 0.1, "beginnings": ("A",), "seed": 5},
        base={"tokens": 20, "max_length": 10},
    ),
    Group(
        TrainSource, train_trees, {"loss_weight": 0.5, "limit": 2, "unit": "block"}, base={"source": Builtin(name="stories"), "limit": 4}
    ),
    Group(TrainSource, train_order, {"weight": 0.5}, base={"source": Builtin(name="stories"), "limit": 4}),
    Group(TrainSource, train_look, {"name": "tales", "role": "replay"}, base={"source": Builtin(name="stories"), "limit": 4}),
    Group(
        EvaluationSource,
        evaluation_report,
        {"name": "tales", "role": "retained", "limit": 2, "holdout": 0.5, "max_length": 16, "on_overflow": "drop"},
        base={"source": Builtin(name="stories"), "limit": 4, "max_length": 150},
    ),
    Group(Generate, answers, {"max_new_tokens": 2, "limit": 1}, base={"metrics": (ExactMatch(),), "max_new_tokens": 6, "limit": 3}),
    Group(Data, trees, {"holdout": 0.5, "max_length": 512, "on_overflow": "truncate_prompt"}, base=mixed_lengths),
    Group(Data, processes, {"workers": 2}, base=lambda world: {**mixed_lengths(world), "workers": 1}),
    Group(Label, example, {"text": "body", "label": "mood", "text_pair": "second", "template": "{text}!", "weight": "importance"}),
    Group(CausalLM, posed, {"prompt_loss_weight": 0.5}),
    Group(
        Classification,
        posed,
        {
            "task": "multi",
            "readout": "label-words",
            "pooling": "mean",
            "labels": ("up", "down"),
            "class_weights": "balanced",
        },
    ),
    Group(
        Classification,
        scored,
        {"words": {"up": " very good indeed"}, "length_normalised": True},
        base={"readout": "label-words", "words": {"up": " up and up again, and then once more"}},
    ),
    Group(Classification, held_out, {"unseen_labels": "count-as-wrong"}),
    Group(OutOfScope, called_outside, {"label": "none", "threshold": 0.62}),
    Group(Model, config, {"base": "nowhere/nothing"}, base={"base": "builtin:tiny"}),
    Group(Model, rendered, {"tokenizer": "talker", "template": "plain"}, base={"base": "builtin:tiny"}),
    Group(Model, loaded, {"dtype": "bfloat16", "attention": "eager"}, base={"base": "builtin:tiny"}),
    Group(Model, fetched, {"revision": "v2"}, base={"base": "own/model"}),
    Group(Model, with_code, {"trust_remote_code": True}),
    Group(Init, initial, {"architecture": "qwen3", "config": {"hidden_size": 32}}, base={"architecture": "llama"}),
    Group(Full, learning, {}),
    Group(Adamix, learning, {**BOTTLENECK, "num_experts": 2, "sharing": "none", "consistency": 0.0}),
    Group(BottleneckAdapter, learning, BOTTLENECK),
    Group(NoDrop, learning_with_drop, {}),
    Group(FixedDrop, learning_with_drop, {"layers": 0}),
    Group(RandomDrop, learning_with_drop, {"layers": 2}, base={"layers": 1}),
    Group(Bitfit, learning, {}),
    Group(Bitfit, with_biases, {"add_biases": True}),
    Group(Norms, learning, {}),
    Group(
        Freeze,
        learning,
        {"top_layers": 2, "patterns": ("layers.0.mlp.up_proj",), "embeddings": True, "head": True, "final_norm": False},
        base={"top_layers": 1},
    ),
    Group(Freeze, learning, {"layers": (0,)}, base={"layers": (-1,)}),
    Group(Freeze, learning_grown, {"grown": True}),
    Group(
        AddTokens,
        with_new_tokens,
        {
            "tokens": ("clock",),
            "leading_space": False,
            "descriptions": {"seven apples": "fruit"},
            "start": "mean",
            "train": "none",
        },
        base={"tokens": ("seven apples",)},
    ),
    Group(AddTokens, with_new_tokens, {"mine": 3}, base={"mine": 2}),
    Group(AddTokens, with_new_tokens, {"file": "boats.txt"}, base={"file": "clocks.txt"}),
    Group(GrowBlocks, grown, {"num_blocks": 2}),
    Group(GrowDepth, grown, {"left_out": 2}),
    Group(GrowWidth, grown, {"factor": 2.0, "start": "split"}),
    Group(GrowExperts, grown, {"num_experts": 3, "experts_per_token": 1}),
    Group(RopeLinear, positions, {"factor": 4.0}, base={"factor": 2.0}),
    Group(RopeDynamic, positions, {"factor": 4.0}, base={"factor": 2.0}),
    Group(RopeYarn, positions, {"factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0}, base={"factor": 2.0}),
    Group(RopeLlama3, positions, {"factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0}, base={"factor": 2.0}),
    Group(Freeze, kept_layers, {"cache_frozen": True}, base={"top_layers": 1}),
    Group(HeadOnly, learning, {}),
    Group(Features, fitted, {"classifier": "svm", "solver": "sklearn", "strength": 0.1}),
    Group(Features, fitted_mlp, {"hidden": 4}, base={"classifier": "mlp"}),
    Group(Hft, learning, {"granularity": "layer", "round_steps": 2}),
    Group(Lisa, learning, {"sampled_layers": 2, "period_steps": 1}, base={"sampled_layers": 1, "period_steps": 4}),
    Group(
        Adalora,
        learning,
        {
            "initial_rank": 6,
            "alpha": 16.0,
            "dropout": 0.5,
            "target_modules": ("q_proj",),
            "orthogonality": 5.0,
        },
        base={"rank": 1, "initial_rank": 4},
    ),
    Group(Adalora, ranks_left, {"rank": 3, "warmup_ratio": 0.5, "final_ratio": 0.7}, base={"rank": 1, "initial_rank": 4}),
    Group(Ia3, learning, {"target_modules": "keys-values-inner", "feedforward_modules": ("v_proj",)}),
    Group(
        Peft,
        learning,
        {"type": "oft", "config": {"r": 4}, "target_modules": ("q_proj",), "extra_trained_modules": ("norm",)},
    ),
    Group(Prompt, learning, {"prompt_length": 3, "init": "random", "ensemble": 2}, base={"prompt_length": 4}),
    Group(Prompt, learning, {"init_text": "The boat is blue"}, base={"prompt_length": 4, "init": "text", "init_text": "Seven apples"}),
    Group(Prompt, learning, {"init_labels": ("apple", "boat")}, base={"prompt_length": 4, "init": "labels"}),
    Group(Prefix, learning, {"prefix_length": 3, "init": "random", "reparametrise": 8}, base={"prefix_length": 4}),
    Group(Prefix, learning, {"ensemble": 2}, base={"prefix_length": 4, "init": "sampled-vocabulary"}),
    Group(Prefix, learning, {"init_text": "The boat is blue"}, base={"prefix_length": 4, "init": "text", "init_text": "Seven apples"}),
    Group(PTuning, learning, {"prompt_length": 3, "encoder": "lstm", "encoder_size": 8}, base={"prompt_length": 4}),
    Group(PTuning, learning, {"encoder_layers": 1}, base={"prompt_length": 4, "encoder": "lstm"}),
    Group(Lora, learning, LOW_RANK, base={"rank": 4, "alpha": 8.0}),
    Group(Qlora, learning, LOW_RANK, base={"rank": 4, "alpha": 8.0}),
    Group(Quantization, quantized_learning, {"format": "fp4", "double_quant": False, "compute_dtype": "bfloat16"}),
    Group(
        Train, steps_seen, {"epochs": 2.0, "steps": 5, "max_tokens": 90, "global_batch_size": 2, "seed": 5}, base={"global_batch_size": 3}
    ),
    Group(Train, micro_batches, {"micro_batch_tokens": 20}),
    Group(
        Train,
        losses,
        {"lr": 0.02, "max_grad_norm": 0.01, "mixed_precision": "bf16"},
        base={"lr": 0.1, "steps": 9, "optimizer": SGD(), "max_grad_norm": None, "schedule": Constant()},
    ),
    Group(Train, assembled, {"layout": "rows", "gradient_checkpointing": True, "compile": True}, base={"steps": 2}),
    Group(Train, device, {"device": "cpu" if torch.cuda.is_available() else "cuda"}),
    Group(Every, hooks, {"log": 3, "evaluate": 3, "save": 5, "keep": 1}, base={"log": 2, "evaluate": 4, "save": 2, "keep": 2}),
    Group(InitFrom, begun, {"path": "second", "adapter": "stack"}, base={"path": "first"}),
    Group(InitFrom, branched, {"continues": True}, base={"path": "trunk"}),
    Group(Recipe, place, {"name": "b", "output": "elsewhere"}, base=RECIPE),
    Group(Recipe, trackers, {"trackers": ("tensorboard",)}, base=RECIPE),
    Group(Recipe, loading, {"version": 2}, base=RECIPE),
)
REFUSED = {("Recipe", "version")}
"""Fields whose only effect is that another value is refused."""

ENTRIES = [(group, name) for group in TABLE for name in group.change]


# ---- the law ---------------------------------------------------------------------------------------------------------------


def specs_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every Spec that a value of this type may hold, at the first level."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from specs_in(part)


def reachable(spec: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """`spec` and every Spec that can stand somewhere below it, by name."""
    found: dict[str, type[BaseModel]] = {}
    waiting = [spec]
    while waiting:
        current = waiting.pop()
        if found.setdefault(current.__name__, current) is not current:
            raise AssertionError(f"two Specs are called {current.__name__}")
        below = [other for item in current.model_fields.values() for other in specs_in(item.annotation)]
        waiting += [other for other in below if other.__name__ not in found]
    return found


def test_every_field_of_the_recipe_has_an_entry() -> None:
    leaves = {
        (name, item)
        for name, spec in reachable(Recipe).items()
        for item, info in spec.model_fields.items()
        if item != "kind" and not any(True for _ in specs_in(info.annotation))
    }
    entries = [(group.spec.__name__, item) for group, item in ENTRIES]
    assert set(entries) == leaves
    assert len(entries) == len(leaves)
    assert {group.spec.__name__ for group in TABLE} == set(reachable(Recipe))


@pytest.mark.parametrize(("group", "name"), ENTRIES, ids=[f"{group.spec.__name__}.{name}" for group, name in ENTRIES])
def test_the_field_changes_what_is_seen(group: Group, name: str, world: World) -> None:
    if (group.spec.__name__, name) in REFUSED:
        group.settings(world)
        with pytest.raises(ValidationError, match=name):
            group.settings(world, **{name: group.change[name]})
        return
    assert group.seen(world, group.settings(world, **{name: group.change[name]})) != world.as_is(group)


UNIONS = {
    "method": (Method, learning),
    "objective": (Objective, posed),
    "drop": (Drop, learning_with_drop),
    "grow": (Grow, grown),
    "rope": (Rope, positions),
    "optimizer": (Optimizer, updates),
    "regularizer": (Regularizer, held),
    "schedule": (Schedule, factors),
    "metric": (Metric, scores),
    "mixture": (Mixture, order_of),
    "format": (Format, example),
    "source": (Source, rows),
}


@pytest.mark.parametrize("name", UNIONS)
def test_every_kind_differs_from_every_other(name: str, world: World) -> None:
    union, seen = UNIONS[name]
    # What reads features cannot be tried on a language model.
    members = [member for member in union_members(union) if not getattr(member, "reads_features", False)]
    groups = [next(group for group in TABLE if group.spec is member and group.seen is seen) for member in members]
    found = [world.as_is(group) for group in groups]
    assert all(first != second for first, second in itertools.combinations(found, 2))


def test_every_union_of_the_recipe_is_looked_at() -> None:
    with_kind = {name for name, spec in reachable(Recipe).items() if "kind" in spec.model_fields}
    alone = {member.__name__ for member in union_members(Objective) if len(union_members(Objective)) == 1}
    assert {member.__name__ for union, _ in UNIONS.values() for member in union_members(union)} | alone == with_kind
