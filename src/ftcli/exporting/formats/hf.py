"""An ordinary Hugging Face folder: merged weights in safetensors, tokenizer, template, generation settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftcli.errors import DataError
from ftcli.exporting.checks import Check
from ftcli.exporting.difference import compare, logits_on
from ftcli.exporting.finite import require_range
from ftcli.exporting.formats.format import Format, Subject
from ftcli.models.settings import Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from ftcli.exporting.source import Source
    from ftcli.models.tokenizer import Tokenizer

BYTES_PER_WEIGHT = {"float32": 4, "bfloat16": 2, "float16": 2}
PROBE_CONVERSATION = (
    {"role": "user", "content": "How many apples are left?"},
    {"role": "assistant", "content": "Five."},
    {"role": "user", "content": "And pears?"},
)


class Hf(Format):
    """Merged, for transformers, vLLM, TGI, and every tool that reads a model folder."""

    kind: ClassVar[str] = "hf"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")

    def num_bytes(self, num_parameters: int, source: Source) -> int:
        return num_parameters * BYTES_PER_WEIGHT.get(self.stored_dtype(source), 4) + 2**20

    def write(self, subject: Subject, folder: Path) -> None:
        write_model(subject, folder, self.stored_dtype(subject.source), self.max_shard_bytes)

    def verify(self, subject: Subject, folder: Path) -> Sequence[Check]:
        import torch

        from ftcli.models.load import load_model
        from ftcli.models.tokenizer import load_tokenizer

        source, dtype = subject.source, getattr(torch, self.stored_dtype(subject.source))
        tokenizer = load_tokenizer(str(folder))
        loaded = load_model(Model(base=str(folder)), tokenizer, dtype=dtype, device=source.device)
        ours, theirs = dict(subject.model.named_parameters()), dict(loaded.named_parameters())
        different = sorted(ours.keys() ^ theirs.keys())
        different += [name for name in ours.keys() & theirs.keys() if not torch.equal(ours[name].to(dtype), theirs[name])]
        detail = f"tensors that differ: {', '.join(different[:10])}" if different else "every tensor bit for bit"
        found = compare(subject.expected, logits_on(loaded, source.probe))
        return [
            Check("the files, loaded by transformers", not different, f"{detail}, {self.stored_dtype(source)}", found),
            _template_check(source.tokenizer, folder),
            stop_check(source.tokenizer, loaded),
        ]

    def usage(self, name: str, source: Source) -> str:
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")\n```'
        )

    def next_commands(self, output: Path) -> Sequence[str]:
        return [f"ftcli generate {output} 'Once upon a time'", f"ftcli serve {output}"]


def write_model(subject: Subject, folder: Path, dtype: str, max_shard_bytes: int) -> None:
    """Write the merged model, rounded to `dtype`, its tokenizer, and generation settings with the tokenizer's stop tokens.

    The float32 weights of `subject` are left as they are.
    """
    import torch

    from ftcli.models.quiet import quiet_libraries

    model, tokenizer = subject.model, subject.source.tokenizer
    settle_stops(model, tokenizer)
    with quiet_libraries():
        model.save_pretrained(folder, state_dict=rounded_state(model, getattr(torch, dtype)), max_shard_size=max_shard_bytes)
    state_dtype(folder, dtype)
    tokenizer.save(folder)


def rounded_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in `dtype`; tied ones stay one tensor, as transformers expects when it saves.

    Raises:
        RequestError: a weight is beyond the range of `dtype`.
    """
    require_range(model.named_parameters(), str(dtype).removeprefix("torch."), "the weights cannot be rounded")
    made: dict[int, Tensor] = {}
    return {
        name: made.setdefault(tensor.data_ptr(), tensor.to(dtype)) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }


def state_dtype(folder: Path, dtype: str) -> None:
    """config.json names the dtype of the weights beside it: transformers writes that of the model in memory."""
    import json

    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    path.write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def settle_stops(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Let the model's own generation stop where its training stopped: EOS and the end of a turn."""
    settings: Any = model.generation_config
    if settings is None or not tokenizer.stop_ids:
        return
    settings.eos_token_id = tokenizer.stop_ids[0] if len(tokenizer.stop_ids) == 1 else list(tokenizer.stop_ids)
    settings.bos_token_id = tokenizer.bos_id
    settings.pad_token_id = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id


def stop_check(tokenizer: Tokenizer, loaded: PreTrainedModel) -> Check:
    """Does the loaded model stop where the tokenizer's conversations end?"""
    settings = loaded.generation_config
    found = None if settings is None else settings.eos_token_id
    ids = set(found) if isinstance(found, list) else {found}
    names = ", ".join(repr(tokenizer.backend.id_to_token(token)) for token in tokenizer.stop_ids) or "none"
    return Check("generation stops", not tokenizer.stop_ids or ids == set(tokenizer.stop_ids), f"stop tokens: {names}")


def _template_check(tokenizer: Tokenizer, folder: Path) -> Check:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(folder)
    texts = ["How many apples are left?", "Übung macht\nden Meister 12.5"]
    same = all(other(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)[0] for text in texts)
    if tokenizer.chat_template is None:
        return Check("the tokenizer, loaded by transformers", same, "no chat template")
    name, conversation = "tokenizer and template, loaded by transformers", [dict(message) for message in PROBE_CONVERSATION]
    try:
        expected = tokenizer.render(conversation, add_generation_prompt=True)
    except DataError:
        is_equal = other.chat_template == tokenizer.chat_template
        return Check(name, same and is_equal, "same ids; the template refuses the probe, and is the same text itself")
    rendered = other.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    return Check(name, same and rendered == expected, "same ids and same text on the probe")
