"""`ftcli extract-lora`: the adapter that makes one model of another, loaded back and compared with the model it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import GateError, Problem, RequestError
from ftcli.exporting.difference import Difference, compare, logits_on, probe_of
from ftcli.files import check_new_folder
from ftcli.merging.engine import working_folder
from ftcli.merging.hold import held
from ftcli.merging.lora.extract import Anatomy, Extraction, ExtractReport, extract_lora
from ftcli.merging.lora.stored import stored_model
from ftcli.models.locate import model_folder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ftcli.models.generate import Progress

DEFAULT_ENERGY = 0.99


@dataclass(frozen=True)
class ExtractedAdapter:
    """An adapter, and how far base and adapter are from the tuned model."""

    report: ExtractReport
    before: Difference
    """The base alone, from the tuned model."""
    after: Difference
    """Base and adapter, from the tuned model."""

    def lines(self) -> list[str]:
        """For people."""
        return [
            self.report.line(),
            f"base and adapter against the tuned model: {self.after.line()}",
            f"the base alone: {self.before.line()}",
        ]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON has it."""
        from dataclasses import asdict

        return {**self.report.to_json(), "after": asdict(self.after), "before": asdict(self.before)}


def extract(
    tuned: str,
    base: str,
    output: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "float32",
    device: str = "auto",
    progress: Progress | None = None,
) -> ExtractedAdapter:
    """Write the adapter that turns `base` into `tuned` at `output`.

    Args:
        tuned: builtin:NAME, a model folder, the run of a full fine-tuning, or a hub id.
        rank: largest rank of a layer.
        energy: smallest share of the energy of each layer's change; with neither, `DEFAULT_ENERGY`.

    Raises:
        RequestError: the models cannot be read, or do not fit each other.
        GateError: base and adapter compute what is not finite, or are further from the tuned model than the base.
    """
    check_new_folder(output)
    folders = [_model_folder(reference) for reference in (tuned, base)]
    say = progress.update if progress is not None else lambda done, total, what: None
    say(0, 3, "read the architecture")
    wanted = DEFAULT_ENERGY if rank is None and energy is None else energy
    extraction = Extraction(stored_model(folders[0]), stored_model(folders[1]), anatomy(folders[1]), rank, wanted)
    roles = dict(zip(("tuned", "base"), folders, strict=True))
    inputs = {f"{role}/{path.name}": path for role, folder in roles.items() for path in sorted(folder.glob("*.safetensors"))}
    name = base if base.startswith("builtin:") or not Path(base).expanduser().is_dir() else str(folders[1].resolve())
    with held(working_folder(output), output):
        check_new_folder(output)
        say(1, 3, "factor the changes")
        report = extract_lora(extraction, output, base=name, inputs=inputs, dtype=dtype, tokenizer=folders[0])
        say(2, 3, "load back and compare")
        found = _compared(folders, output, report, device)
    say(3, 3, "extract")
    return found


def anatomy(folder: Path) -> Anatomy:
    """What the architecture of a model folder says of its parameters; no weights are read.

    Raises:
        RequestError: there is no readable configuration, or not one of a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    from ftcli.models.load import load_config
    from ftcli.models.quiet import quiet_libraries
    from ftcli.models.settings import Model

    config = load_config(Model(base=str(folder)))
    with quiet_libraries(), torch.device("meta"):
        try:
            model: nn.Module = AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            raise RequestError("the base cannot be taken apart", [Problem(str(folder), str(error).splitlines()[0])]) from error
    linear = {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and f"{name}.weight" in dict(model.named_parameters())
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tied = {
        name: names[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if names[id(parameter)] != name
    }  # fmt: skip
    # an output head that is a layer of its own is changed by factors like any other
    return Anatomy(linear, tuple(names.values()), tied)


def _model_folder(reference: str) -> Path:
    """The folder with the weights; of a run, its model."""
    folder = Path(reference).expanduser()
    if (folder / "adapter").is_dir() and (folder / "recipe.resolved.yaml").is_file():
        problem = Problem(reference, "is a run of an adapter", f"it is `{folder / 'adapter'}` already")
        raise RequestError("there is nothing to extract", [problem])
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    found = model_folder(str(folder) if folder.is_dir() else reference)
    if not (found / "config.json").is_file():
        raise RequestError("the model cannot be read", [Problem(reference, "has no config.json", "a model folder, or the run of one")])
    return found


def _compared(folders: list[Path], output: Path, report: ExtractReport, device: str) -> ExtractedAdapter:
    """Base and adapter, and the base alone, against the tuned model.

    Raises:
        GateError: the adapter takes the base further away; it is removed.
    """
    import shutil

    from ftcli.exporting.source import chosen_device
    from ftcli.methods.adapter import load_adapter
    from ftcli.models.load import load_model
    from ftcli.models.quiet import quiet_libraries
    from ftcli.models.settings import Model
    from ftcli.models.tokenizer import load_tokenizer

    tokenizer, where = load_tokenizer(str(folders[0])), chosen_device(device)
    probe = probe_of(tokenizer, None)

    def load(folder: Path) -> PreTrainedModel:
        return load_model(Model(base=str(folder)), None, dtype="float32", device=where)

    with quiet_libraries():
        expected = logits_on(load(folders[0]), probe)
        plain = load(folders[1])
        before = compare(expected, logits_on(plain, probe))
        after = compare(expected, logits_on(load_adapter(plain, output), probe))
    if not after.kl <= max(before.kl, 1e-6):
        shutil.rmtree(output)
        problem = Problem("", f"the base alone: {before.line()}; with the adapter: {after.line()}", "a higher rank or energy")
        raise GateError("the adapter takes the base further from the tuned model", [problem])
    return ExtractedAdapter(report, before, after)
