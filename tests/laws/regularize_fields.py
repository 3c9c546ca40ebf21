"""What is seen of the fields of regularizers: observables for the table of `test_fields`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save_file

from ftcli.errors import FtcliError
from ftcli.methods.full import Full
from ftcli.methods.parameter_groups import trained_parameters
from ftcli.objectives.causal_lm import CausalLM
from ftcli.objectives.regularize.ewc import EWC, FisherRows
from ftcli.objectives.regularize.kl import KL, TopK
from ftcli.objectives.regularize.l2_sp import L2SP
from ftcli.objectives.regularize.regularizer import RegularizeContext
from ftcli.objectives.regularize.start import Start
from ftcli.training.proofs import hash_tensors


def held(world: Any, regularizer: Any) -> Any:
    """The weights after three real steps on rows that are said to be replayed, or why there are none; other models and earlier runs
    are made here."""
    regularizer = regularizer.model_copy(update=_made(world, regularizer))
    recipe = world.bench.recipe
    source = recipe.data.train[0].model_copy(update={"role": "replay"})
    data = recipe.data.model_copy(update={"train": (source,)})
    recipe = recipe.model_copy(update={"data": data, "objective": CausalLM(regularize=(regularizer,))})
    try:
        module = replace(world.bench, recipe=recipe).run(Full(), 3).module
    except FtcliError as error:
        return str(error)
    return [parameter.detach().numpy().tobytes() for parameter in module.parameters()]


def _made(world: Any, regularizer: Any) -> dict[str, Any]:
    """The paths that a regularizer names, with something at each."""
    if isinstance(regularizer, KL) and regularizer.teacher == "other":
        folder = world.folder / "other-teacher"
        if not folder.exists():
            module = world.bench.parts(Full())[1].module
            _move(module)
            Full().save(module, folder)
        return {"teacher": str(folder)}
    if isinstance(regularizer, EWC) and regularizer.earlier is not None:
        parts = world.bench.parts(Full())[1]
        module = parts.module
        begun = {"base_fingerprint": parts.base_fingerprint, "hashes": {"initial_trainable": hash_tensors(trained_parameters(module))}}
        for name, size in (("first", 1.0), ("second", 2.0)):
            (world.folder / f"{name}-run").mkdir(exist_ok=True)
            (world.folder / f"{name}-run" / "manifest.json").write_text(json.dumps(begun), encoding="utf-8")
            ones = {key: size * torch.ones_like(p, dtype=torch.bfloat16) for key, p in trained_parameters(module)}
            save_file(ones, world.folder / f"{name}-run" / "fisher.safetensors")
        return {"earlier": str(world.folder / f"{regularizer.earlier.rpartition('/')[2]}-run")}
    return {}


def _move(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in trained_parameters(module):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def held_by_cache(world: Any, cache: TopK) -> Any:
    """The same with the teacher's answers on disk."""
    return held(world, KL(cache=cache))


def held_by_rows(world: Any, rows: FisherRows) -> Any:
    """The same with the Fisher information of other rows."""
    return held(world, EWC(rows=rows, examples=2))


def pulled_head(world: Any, settings: L2SP) -> float:
    """The penalty where the head is a fresh one."""
    module = world.bench.parts(Full())[1].module
    start = Start.of(module)
    context: Any = {"roles": [], "teacher": None, "cached": None, "fisher": None}
    pull = settings.build("l2_sp", RegularizeContext(start=lambda: start, head_names={"lm_head.weight"}, **context))
    return sum(float(item.weight * item.distance().square().sum()) for item in pull.pulled)  # type: ignore[attr-defined]
