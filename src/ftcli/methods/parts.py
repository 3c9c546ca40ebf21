"""Which part of a model a parameter belongs to: embeddings, a decoder layer, norms, the head. Read from the modules, not from names of
architectures.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from ftcli.errors import RequestError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_NORM_NAME = re.compile(r"norm|^ln_|^ln$|layernorm", re.IGNORECASE)
_ROUTER_COUNTER = "e_score_correction_bias"
"""A bias that is moved by counting tokens and never gets a gradient."""


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and modules of the decoder's stack of layers.

    Raises:
        RequestError: no list of modules is as long as the configuration says.
    """
    from torch.nn import ModuleList

    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, ModuleList) and len(module) == count and any(True for _ in module.parameters()):
            return name, module
    raise RequestError(f"the decoder layers of `{model.config.model_type}` cannot be found", hint="method.kind: full or lora")


def layer_of(name: str, stack: str) -> int | None:
    """The decoder layer that a parameter belongs to, None outside of the stack.

    Example:
        >>> layer_of("model.layers.11.mlp.up_proj.weight", "model.layers"), layer_of("model.norm.weight", "model.layers")
        (11, None)
    """
    rest = name.removeprefix(f"{stack}.")
    return None if rest == name else int(rest.partition(".")[0])


def embedding_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the token and position embeddings' parameters; a head tied to them is the same parameter."""
    from torch.nn import Embedding

    stack, _ = decoder_layers(model)
    chosen = [
        module
        for name, module in model.named_modules()
        if module is model.get_input_embeddings() or (isinstance(module, Embedding) and layer_of(name + ".", stack) is None)
    ]
    return _names(model, chosen)


def head_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the output head's parameters; of a head tied to the embedding it is the embedding's name."""
    from ftcli.models.classifier import head_names

    head = model.get_output_embeddings()
    return _names(model, [model.get_submodule(name) for name in head_names(model)] if head is None else [head])


def norm_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the parameters of all normalisation layers, wherever they stand."""
    return [f"{name}.{own}" for name, module in _norms(model) for own, _ in module.named_parameters(recurse=False)]


def final_norm_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the parameters of the norm above the last layer: registered behind the layers, or called final."""
    stack, _ = decoder_layers(model)
    order = [name for name, _ in model.named_modules()]
    chosen = [
        module
        for name, module in _norms(model)
        if layer_of(name + ".", stack) is None and (order.index(name) > order.index(stack) or "final" in name)
    ]
    return _names(model, chosen)


def bias_parameters(model: PreTrainedModel) -> list[str]:
    """Names of all biases, those of norms and stacked experts among them."""
    return [name for name, _ in model.named_parameters() if name.endswith("bias") and not name.endswith(_ROUTER_COUNTER)]


def is_norm(name: str, module: nn.Module) -> bool:
    """Whether a module called `name` normalises: by its class, or by its name where it holds vectors only."""
    own = list(module.parameters(recurse=False))
    if not own or any(parameter.ndim > 1 for parameter in own):
        return False
    return "norm" in type(module).__name__.lower() or _NORM_NAME.search(name.rpartition(".")[2]) is not None


def _norms(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if is_norm(name, module))


def _names(model: PreTrainedModel, modules: Sequence[nn.Module]) -> list[str]:
    wanted = {id(parameter) for module in modules for parameter in module.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in wanted]


def in_words(names: Collection[str], every: Collection[str]) -> str:
    """Parameter names in one line: a module of which all are named by its own name, numbers of layers and experts gathered.

    Args:
        every: the names of all parameters of the model.

    Example:
        >>> every = ["wte", "h.0.up.weight", "h.0.up.bias", "h.0.down.weight", "h.1.up.weight", "h.1.up.bias", "h.1.down.weight"]
        >>> in_words(["h.0.up.bias", "h.1.up.bias"], every), in_words(every[4:], every), in_words(["wte", "h.1.up.weight"], every)
        ('h.{0-1}.up.bias', 'h.1', 'wte, h.1.up.weight')
    """
    gathered: dict[str, list[int]] = {}
    for name in _whole_modules(names, every):
        number = re.search(r"\.(\d+)(?=\.|$)", name)
        key = name if number is None else f"{name[: number.start(1)]}{{}}{name[number.end(1) :]}"
        gathered.setdefault(key, []).extend([] if number is None else [int(number[1])])
    return ", ".join(key.replace("{}", _ranges(numbers), 1) if numbers else key for key, numbers in gathered.items())


def _whole_modules(names: Collection[str], every: Collection[str]) -> list[str]:
    """`names` in the model's order, those of a module that is named in full as the module."""
    chosen = frozenset(names)
    incomplete = {prefix for name in every if name not in chosen for prefix in _prefixes(name)}
    found = (next((prefix for prefix in _prefixes(name) if prefix not in incomplete), name) for name in every if name in chosen)
    return list(dict.fromkeys(found))


def _prefixes(name: str) -> list[str]:
    """Names of the modules around a parameter, the outermost first; a stack of layers is none, each layer is."""
    parts = name.split(".")
    ends = range(1, len(parts))
    return [".".join(parts[:end]) for end in ends if not parts[end].isdigit()]


def _ranges(numbers: Sequence[int]) -> str:
    """`{0-2,5}` of several numbers, the number itself of one."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text if len(runs) == 1 and runs[0][0] == runs[0][1] else f"{{{text}}}"
