"""What prompts, prefixes and p-tuning share: virtual tokens before every example, kept and loaded as PEFT keeps them.

A soft prompt does not start at the identity: whatever stands before an example changes what the model computes. What it starts
from is stated by `init`, and a start from text computes exactly what the base does with that text before the example.
While it trains it may be computed by an encoder; what is saved is always the virtual tokens themselves.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, cast

from ftcli.errors import Problem, RequestError
from ftcli.methods.method import MethodSettings

if TYPE_CHECKING:
    from peft import PeftModel, PromptLearningConfig
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ftcli.methods.context import AttachContext

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
WEIGHTS_KEY = "prompt_embeddings"
DEFAULT_MEMBER = "default"
NUM_COMMON_TOKENS = 5000


class SoftPrompt(MethodSettings):
    """Virtual tokens before every example; every weight of the base rests."""

    artefact: ClassVar[Literal["model", "adapter"]] = "adapter"

    @property
    def member_names(self) -> tuple[str, ...]:
        """The adapters' names: one, or those of an ensemble."""
        return (DEFAULT_MEMBER,) if self.num_members == 1 else tuple(f"member-{index}" for index in range(self.num_members))

    @abstractmethod
    def peft_config(self, model: PreTrainedModel) -> PromptLearningConfig:
        """PEFT's configuration for training.

        Raises:
            RequestError: the model has no place for this kind of prompt.
        """

    @abstractmethod
    def saved_config(self, config: PromptLearningConfig) -> PromptLearningConfig:
        """The configuration of the virtual tokens alone, without what computed them during training."""

    @abstractmethod
    def start(self, model: PreTrainedModel, context: AttachContext, config: PromptLearningConfig) -> Tensor | None:
        """What the embedding of PEFT's encoder starts from; None leaves PEFT's own random start."""

    def attach(self, model: PreTrainedModel, context: AttachContext) -> nn.Module:
        """`model`, frozen, with a soft prompt (or the members of an ensemble) before whatever it reads.

        Raises:
            RequestError: the settings do not fit the model, or there is nothing to start from.
        """
        import torch

        from ftcli.methods.class_head import refuse_class_head
        from ftcli.models.quiet import quiet_libraries

        refuse_class_head(model, self.kind)  # type: ignore[attr-defined]  # each kind declares its own
        with quiet_libraries(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            module = _with_adapters(model, {name: self.peft_config(model) for name in self.member_names})
            for name in self.member_names:
                start = None if context.restoring else self.start(model, context, cast("Any", module.peft_config[name]))
                if start is not None:
                    weight = cast("Any", module.prompt_encoder[name]).embedding.weight
                    weight.data.copy_(start.to(weight.dtype))
        module.prompt_encoder.requires_grad_(True)
        return module

    def save(self, module: nn.Module, folder: Path) -> None:
        """Write the virtual tokens in PEFT's layout; the members of an ensemble each in a folder of its own."""
        from safetensors.torch import save_file

        from ftcli.layout.virtual import MEMBERS, prompt_weight

        members = cast("tuple[str, ...]", getattr(module, MEMBERS))
        base = cast("Any", module).get_base_model().config._name_or_path
        for name in members:
            place = folder if len(members) == 1 else folder / name
            place.mkdir(parents=True, exist_ok=True)
            save_file(
                {WEIGHTS_KEY: prompt_weight(module, name).detach().float().cpu().contiguous()}, place / WEIGHTS_FILE, {"format": "pt"}
            )
            config = self.saved_config(cast("Any", module).peft_config[name]).to_dict()
            config |= {"inference_mode": True, "base_model_name_or_path": base}
            (place / CONFIG_FILE).write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")

    def load(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        """What was saved, on a fresh `base`, in evaluation mode and frozen.

        Raises:
            RequestError: the folder holds no soft prompt, or one of another base.
        """
        return load_soft_prompts(base, folder, self.member_names)

    @property
    def merges(self) -> bool:
        """Virtual tokens change no weight."""
        return False

    def merge(self, module: nn.Module) -> NoReturn:
        """Refuses: there are no plain weights that compute the same.

        Raises:
            RequestError: always.
        """
        what = f"kind `{cast('Any', self).kind}` adds context before every example and changes no weight: there is nothing to fold in"
        hint = "keep the `adapter` folder beside the base: PEFT loads it, and so do `ftcli generate` and `ftcli chat`"
        raise RequestError("a soft prompt cannot be merged", [Problem("method.kind", what, hint)])


def load_soft_prompts(base: PreTrainedModel, folder: Path, members: tuple[str, ...]) -> nn.Module:
    """The soft prompts in `folder`, or in its folders of these names, put on `base`.

    Raises:
        RequestError: a file cannot be read, or is of another base.
    """
    import torch

    from ftcli.models.quiet import quiet_libraries

    places = {name: folder if len(members) == 1 else folder / name for name in members}
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        module = _with_adapters(base, {name: _read_config(place) for name, place in places.items()})
    for name, place in places.items():
        weight, found = cast("Any", module.prompt_encoder[name]).embedding.weight, _read_weight(place)
        if weight.shape != found.shape:
            shapes = f"{tuple(found.shape)}, the base has room for {tuple(weight.shape)}"
            raise _unfit(place, f"the virtual tokens are {shapes}: they were trained on another base")
        weight.data.copy_(found)
    return module.requires_grad_(False).eval()


def _with_adapters(model: PreTrainedModel, configs: dict[str, PromptLearningConfig]) -> PeftModel:
    """`model` with one soft prompt for each of `configs`, all of which it computes with."""
    from peft import get_peft_model

    from ftcli.layout.virtual import MEMBERS

    expected = {name: (config.token_dim, config.num_attention_heads) for name, config in configs.items()}
    (first, config), *others = configs.items()
    module = get_peft_model(model, config, adapter_name=first)
    for name, other in others:
        module.add_adapter(name, other)
    for name, sizes in expected.items():
        found: Any = module.peft_config[name]
        if (found.token_dim, found.num_attention_heads) != sizes:
            what = f"PEFT takes it for a model with keys of {found.token_dim} numbers in {found.num_attention_heads} heads, it has {sizes}"
            raise RequestError("the method does not fit the model", [Problem("method.kind", what)])
    module.word_embeddings = model.get_input_embeddings()  # PEFT guesses it by the size of the vocabulary
    setattr(module, MEMBERS, tuple(configs))
    return module


def _read_config(folder: Path) -> PromptLearningConfig:
    from peft import PrefixTuningConfig, PromptTuningConfig

    classes: dict[str, Any] = {"PROMPT_TUNING": PromptTuningConfig, "PREFIX_TUNING": PrefixTuningConfig}
    try:
        fields = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return cast("PromptLearningConfig", classes[fields["peft_type"]].from_peft_type(**fields))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unfit(folder, f"cannot read {CONFIG_FILE}: {error}") from error


def _read_weight(folder: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise _unfit(folder, f"cannot read {WEIGHTS_FILE}: {error}") from error
    if set(tensors) != {WEIGHTS_KEY}:
        raise _unfit(folder, f"`{WEIGHTS_FILE}` holds {', '.join(sorted(tensors)) or 'nothing'}, not `{WEIGHTS_KEY}`")
    return tensors[WEIGHTS_KEY]


def _unfit(folder: Path, what: str) -> RequestError:
    return RequestError("the adapter cannot be loaded", [Problem(str(folder), what)])


def hidden_size(model: PreTrainedModel) -> int:
    """Numbers of an input embedding."""
    return int(cast("Any", model.get_input_embeddings()).weight.shape[1])


def common_token_ids(context: AttachContext, num_rows: int, count: int) -> list[int]:
    """`count` different tokens drawn from the common ones: the 5000 lowest ids, by which tokenizers count up from the frequent.

    Source: Lester et al. 2021, arXiv:2104.08691, section 3.2, who draw from the 5000 most common tokens.
    """
    import torch

    special = set() if context.tokenizer is None else set(context.tokenizer.backend.get_added_tokens_decoder())
    size = num_rows if context.tokenizer is None else min(num_rows, context.tokenizer.vocab_size)
    pool = [token for token in range(min(size, NUM_COMMON_TOKENS + len(special))) if token not in special]
    drawn = [pool[index] for index in torch.randperm(len(pool)).tolist()]
    return repeated(drawn, count)


def text_ids(context: AttachContext, text: str, count: int) -> list[int]:
    """The first `count` tokens of `text`, which is repeated where it is shorter.

    Raises:
        RequestError: there is no token in it.
    """
    ids = [] if context.tokenizer is None else context.tokenizer.encode(text)[0]
    if not ids:
        raise RequestError("there is nothing to start from", [Problem("method.init_text", f"`{text}` has no tokens")])
    return repeated(ids, count)


def repeated(ids: list[int], count: int) -> list[int]:
    """`ids` over and over, `count` in all.

    Example:
        >>> repeated([1, 2, 3], 5)
        [1, 2, 3, 1, 2]
    """
    return (ids * (count // len(ids) + 1))[:count]
