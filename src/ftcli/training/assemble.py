"""From a recipe to the parts a run is made of. `ftcli check` stops here; `ftcli train` goes on."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.data.growing import FirstTrees
from ftcli.data.order import Order
from ftcli.data.prepare import Prepared, Progress, prepare
from ftcli.errors import Problem, RequestError
from ftcli.layout.model import TreeModel, inner_model
from ftcli.layout.probe import LayoutChoice, choose_layout
from ftcli.layout.virtual import has_prefix
from ftcli.methods.parameter_groups import trained_parameters
from ftcli.recipe.trackers import require_trackers
from ftcli.training.batches import BatchSource
from ftcli.training.new_tokens import NewTokens, settle_tokens
from ftcli.training.own_text import with_own_text
from ftcli.training.regularizers import Place, regularizers_of
from ftcli.training.seeds import derive_seed, seed_torch
from ftcli.training.step import Learner

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ftcli.data.tree import TokenTree
    from ftcli.methods.context import AttachContext
    from ftcli.models.settings import Model
    from ftcli.models.tokenizer import Tokenizer
    from ftcli.recipe.recipe import Recipe

NUM_PROBE_TREES = 4
MIN_EXAMPLE_TOKENS = 2
MAX_COUNTED_ANSWERS = 5000


def cache_folder() -> Path:
    """Where tokenised data is kept: $FTCLI_CACHE, or ~/.cache/ftcli."""
    return Path(os.environ.get("FTCLI_CACHE") or Path.home() / ".cache" / "ftcli")


@dataclass(frozen=True, slots=True, eq=False)
class DataParts:
    """What is seen."""

    tokenizer: Tokenizer
    prepared: Prepared
    order: Order
    model: Model | None = None
    """The recipe's model, its new tokens named; None where the recipe names all there are."""
    new_tokens: NewTokens | None = None

    def close(self) -> None:
        """Stop what is still being tokenised."""
        for store in self.prepared.train:
            store.close()

    def probe_trees(self) -> list[TokenTree]:
        """A few examples that every proof uses."""
        return [store.tree(i) for store in self.prepared.train for i in range(min(NUM_PROBE_TREES, len(store)))][: 2 * NUM_PROBE_TREES]


@dataclass(frozen=True, slots=True, eq=False)
class ModelParts:
    """What trains."""

    module: nn.Module
    """What the method returned."""
    model: TreeModel
    layout: LayoutChoice
    lr: float
    """Peak learning rate."""
    base_fingerprint: str = ""
    """Of the base, before anything was put on it."""


def assemble_data(recipe: Recipe, progress: Progress | None, first_rows: int | None = None, *, may_grow: bool = False) -> DataParts:
    """Read, tokenise and order the data; all that can be wrong with it is found here.

    Args:
        may_grow: with mixture `stream`, sources may be tokenised on behind what the first steps need; `close` ends that.

    Raises:
        RequestError: and its kinds, for anything wrong with tokenizer, template, files or rows.
    """
    recipe, new_tokens = settle_tokens(recipe, first_rows)
    tokenizer = recipe.model.load_tokenizer()
    formats = recipe.objective.formats
    described, notes = with_own_text(recipe, cache_folder(), progress, first_rows)
    prepared = prepare(
        described, tokenizer, cache_folder=cache_folder(), progress=progress, first_rows=first_rows, formats=formats, may_grow=may_grow
    )
    prepared = replace(prepared, notes=(*(new_tokens.lines() if new_tokens is not None else ()), *notes, *prepared.notes))
    order = Order(
        [len(store.example_lengths) for store in prepared.train],
        [store.mean_tokens for store in prepared.train],
        [entry.weight for entry in recipe.data.train],
        recipe.data.mixture,
        roles=[store.role for store in prepared.train],
        lengths=[store.example_lengths for store in prepared.train],
        first_trees=FirstTrees(prepared.train),
        global_batch_size=recipe.train.global_batch_size,
        epochs=recipe.train.epochs,
        steps=recipe.train.steps,
        max_tokens=recipe.train.max_tokens,
        seed=recipe.train.seed,
        arrived=lambda source, count: prepared.train[source].arrived(count),
    )
    if recipe.data.mixture.kind == "replay":
        prepared = replace(prepared, notes=(*prepared.notes, order.plan_line([store.name for store in prepared.train])))
    return DataParts(tokenizer, prepared, order, recipe.model, new_tokens)


def settled(recipe: Recipe, data: DataParts) -> Recipe:
    """The recipe with everything in it that only the data tells: the labels of a classifier, mined tokens.

    Raises:
        DataError: the data is not what the objective needs.
    """
    if data.model is not None and data.model is not recipe.model:
        recipe = recipe.model_copy(update={"model": data.model})
    objective = recipe.objective.settled(data.prepared.train, data.prepared.evaluation, data.tokenizer)
    return recipe if objective is recipe.objective else recipe.model_copy(update={"objective": objective})


def make_accelerator(recipe: Recipe, folder: Path | None) -> Accelerator:
    """The accelerator for the recipe's device and precision.

    Raises:
        RequestError: the device is not there, or the launcher asks for sharding that checkpoints cannot do.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType

    device = recipe.train.device
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device, True):
        raise RequestError(f"train.device: `{device}` is not available here", hint="`auto` takes what is there")
    if recipe.train.mixed_precision == "fp16" and not (available["cuda"] and device in ("auto", "cuda")):
        raise RequestError("train.mixed_precision: `fp16` needs a CUDA device", hint="bf16, or no")
    require_trackers(recipe.trackers)
    if "RANK" not in os.environ:
        # accelerate keeps device and precision for the life of the process; the next run may want others.
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        # Without it, accelerate takes processes on a machine without accelerators for strangers to each other.
        cpu=device == "cpu" or (device == "auto" and not any(available.values())),
        mixed_precision=_mixed_precision(recipe),
        gradient_accumulation_steps=1,
        # Data-parallel wrappers would wait for the gradient of a parameter that rests.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)] if recipe.method.rests else None,
        log_with=list(recipe.trackers) or None,
        project_dir=None if folder is None else str(folder),
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise RequestError(f"sharded training ({accelerator.distributed_type.value}) is not supported yet", hint="launch with plain DDP")
    return accelerator


def _mixed_precision(recipe: Recipe) -> str:
    import torch

    if recipe.train.mixed_precision != "auto":
        return recipe.train.mixed_precision
    on_cuda = recipe.train.device in ("auto", "cuda") and torch.cuda.is_available()
    return "bf16" if on_cuda and torch.cuda.is_bf16_supported() else "no"


def load_base(recipe: Recipe, tokenizer: Tokenizer, device: torch.device, *, quantized: bool = True) -> PreTrainedModel:
    """The base model of a recipe as its method wants it loaded, bit for bit the same each time."""
    from ftcli.models.load import load_model

    quantization = recipe.method.quantization() if quantized else None
    seed = derive_seed(recipe.train.seed, "model")
    dtype = weights_dtype(recipe)
    head = recipe.objective.head
    return load_model(recipe.model, tokenizer, quantization=quantization, dtype=dtype, device=device, seed=seed, head=head)


def weights_dtype(recipe: Recipe) -> str:
    """float32 for weights that train; `auto` leaves it to the device and the checkpoint."""
    if recipe.model.dtype == "auto" and recipe.method.artefact == "model":
        return "float32"
    return recipe.model.dtype


def assemble_model(recipe: Recipe, data: DataParts, accelerator: Accelerator, *, restoring: bool = False) -> ModelParts:
    """Load the base, attach the method, and choose the layout by the probe.

    Args:
        restoring: a checkpoint's weights come next, so that costly initial values need not be computed.

    Raises:
        RequestError: for anything that does not fit: a base that cannot be had, a target that matches nothing, a layout.
    """
    from ftcli.methods.context import AttachContext
    from ftcli.models.fingerprint import base_fingerprint

    base = load_base(recipe, data.tokenizer, accelerator.device)
    # Ordinary floating-point weights of the base, for initialisations that compare with them; loaded only when asked for.
    context = AttachContext(
        seed=derive_seed(recipe.train.seed, "method"),
        sample_batches=lambda count: sample_batches(recipe, data, count),
        original_base=lambda: load_base(recipe, data.tokenizer, _cpu(), quantized=False),
        restoring=restoring,
        tokenizer=data.tokenizer,
        answers=lambda count: frequent_answers(data, count),
    )
    require_context(data, base, recipe.method.num_virtual_tokens, recipe.objective.longest_addition)
    fingerprint = base_fingerprint(base)
    seed_torch(recipe.train.seed, "attach")
    module = attached(recipe, base, context)
    if recipe.train.gradient_checkpointing:
        inner_model(module).activation_checkpointing_enable({"use_reentrant": False})
    model = TreeModel(module)
    choice = choose_layout(model, data.probe_trees(), recipe.train.layout, recipe.method.layouts, recipe.data.longest())
    if recipe.train.gradient_checkpointing and choice.layout == "rows" and has_prefix(module):
        # Transformers drops a cache under gradient checkpointing, and with it the prefix, with a mere warning.
        problem = Problem(
            "train.gradient_checkpointing", f"drops the prefix in layout `rows`, and {choice.reason}", "false, or kind `prompt`"
        )
        raise RequestError("the method does not fit the model", [problem])
    if recipe.train.compile:
        inner_model(module).base_model.compile(dynamic=True)
    return ModelParts(module, model, choice, recipe.train.lr or recipe.method.lr_at(model_width(module)), fingerprint)


def attached(recipe: Recipe, base: PreTrainedModel, context: AttachContext) -> nn.Module:
    """`base` with the method on it, and its classification head, where it has one, trained.

    Raises:
        RequestError: the method does not fit the model or the objective.
    """
    from ftcli.methods.class_head import let_head_train
    from ftcli.models.added_rows import let_rows_train
    from ftcli.training.init_from import begin

    module = recipe.method.attach(base, context) if recipe.init_from is None else begin(recipe, base, context)
    if not recipe.method.reads_features:
        let_head_train(module, recipe.method.kind)
    let_rows_train(module, recipe.model, recipe.method.artefact)
    return module


def featured(recipe: Recipe, data: DataParts, parts: ModelParts, progress: Progress | None) -> DataParts:
    """The data with every example's features, where the method reads these; what learns from all of them at once gets them, too.

    Raises:
        RequestError: the method's solver does not know the task.
    """
    if not recipe.method.reads_features:
        return data
    from ftcli.training.features import key_of_base, training_set, with_features

    key, pad_id = key_of_base(parts.model), data.tokenizer.pad_id or 0
    train = [with_features(parts.model, store, key, pad_id, progress) for store in data.prepared.train]
    evaluation = [with_features(parts.model, store, key, pad_id, progress) for store in data.prepared.evaluation]
    recipe.method.learn_from(parts.module, training_set(train, recipe.objective))
    return replace(data, prepared=replace(data.prepared, train=list(train), evaluation=list(evaluation)))


def model_width(module: nn.Module) -> int:
    """The hidden size, by which default learning rates are scaled."""
    return int(inner_model(module).config.get_text_config().hidden_size)


def require_context(data: DataParts, model: PreTrainedModel, num_virtual_tokens: int = 0, num_added: int = 0) -> None:
    """Refuse examples that are longer than what the model can see at once, with the virtual tokens before them.

    Raises:
        RequestError: positions beyond the context are untrained, or do not exist.
    """
    from ftcli.models.generate import context_length

    context = context_length(model)
    if context is not None and num_virtual_tokens:
        whole, context = context, context - num_virtual_tokens
        if context < MIN_EXAMPLE_TOKENS:
            what = f"{num_virtual_tokens} virtual tokens leave no room for an example: the model sees {whole} tokens at once"
            raise RequestError("the method does not fit the model", [Problem("method", what, "make the prompt shorter")])
    longest = max((store.longest + num_added, store.name) for store in (*data.prepared.train, *data.prepared.evaluation))
    if context is not None and longest[0] > context:
        problem = Problem(
            "data.max_length",
            f"`{longest[1]}` has examples of up to {longest[0]} tokens, and the model sees {context} at once"
            + (f" after {num_virtual_tokens} virtual ones" if num_virtual_tokens else ""),
            f"`max_length: {context}`; `on_overflow` says what becomes of longer ones",
        )
        raise RequestError("the data does not fit the model", [problem])


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


def sample_batches(recipe: Recipe, data: DataParts, count: int) -> list[dict[str, Tensor]]:
    """`count` padded batches of the first training steps, for initialisations that look at data."""
    from ftcli.layout.build import build_posed

    steps = range(1, min(count, data.order.num_steps) + 1)
    batches = []
    for step in steps:
        trees = [data.prepared.train[source].tree(index) for source, index in data.order.examples_at(step)]
        batch = build_posed("rows", [recipe.objective.pose(tree) for tree in trees], data.tokenizer.pad_id or 0)
        assert batch.attention_mask is not None
        batches.append({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask})
    return batches


def frequent_answers(data: DataParts, count: int) -> list[list[int]]:
    """The tokens of the most frequent answers among the first training examples, without the tokens that end them."""
    stops, counted = set(data.tokenizer.stop_ids), Counter[tuple[int, ...]]()
    for store in data.prepared.train:
        for index in range(min(len(store), MAX_COUNTED_ANSWERS)):
            tree = store.tree(index)
            spans = [tree.tokens[start:end].tolist() for start, end, weight, is_prompt in tree.spans.tolist() if weight and not is_prompt]
            counted.update(tuple(token for token in span if token not in stops) for span in spans)
    del counted[()]
    return [list(answer) for answer, _ in counted.most_common(count)]


def assemble_learner(
    recipe: Recipe, data: DataParts, parts: ModelParts, accelerator: Accelerator, place: Place | None = None
) -> tuple[Learner, BatchSource]:
    """The optimizer, the regularizers and the batches, prepared for the devices of this run.

    Args:
        place: where what regularizers need is kept.
    """
    regularizers = regularizers_of(
        recipe, data, parts, accelerator, lambda other: load_base(other, data.tokenizer, accelerator.device), place or Place()
    )
    weight_decay = getattr(recipe.train.optimizer, "weight_decay", 0.0)
    groups = recipe.method.parameter_groups(parts.module, parts.lr, weight_decay)
    optimizer = recipe.train.optimizer.build(groups, parts.lr)
    model, prepared_optimizer = accelerator.prepare(parts.model, optimizer)
    learner = Learner(
        accelerator=accelerator,
        model=model,
        optimizer=prepared_optimizer,
        objective=recipe.objective,
        method=recipe.method,
        num_steps=data.order.num_steps,
        max_grad_norm=recipe.train.max_grad_norm,
        seed=recipe.train.seed,
        num_sources=len(data.prepared.train),
        regularizers=regularizers,
    )
    batches = BatchSource(
        stores=data.prepared.train,
        order=data.order,
        objective=recipe.objective,
        layout=parts.layout.layout,
        # Every member of an ensemble computes every token.
        micro_batch_tokens=max(1, recipe.train.micro_batch_tokens // recipe.method.num_members),
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        pad_id=data.tokenizer.pad_id or 0,
    )
    return learner, batches


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of a module; a quantised weight counts as the numbers it stands for."""
    trainable = sum(p.numel() for _, p in trained_parameters(module))
    total = 0
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else int(_product(state.shape))
    return trainable, total


def _product(shape: Any) -> int:
    result = 1
    for size in shape:
        result *= int(size)
    return result
