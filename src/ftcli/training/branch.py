"""Where a run begins to count: at its first step, or, as a branch of an earlier run, behind the step of one of its checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ftcli.errors import Problem, RequestError
from ftcli.training.checkpoint import Checkpoints
from ftcli.training.init_from import find_origin
from ftcli.training.loop import Progress

if TYPE_CHECKING:
    from ftcli.optim.schedules import Schedule
    from ftcli.recipe.recipe import Recipe
    from ftcli.training.step import Learner


def progress_at_begin(recipe: Recipe, learner: Learner, num_steps: int) -> Progress:
    """The progress of a run that has no checkpoint of its own; a branch's weights and optimizer are put into `learner`.

    A branch goes on in the order of its own data at the step that the trunk had reached, so that with the trunk's recipe, but for the
    number of steps, it is the run that was never cut.

    Raises:
        RequestError: the recipe's branch cannot be, and why.
        RunError: the checkpoint is damaged, or of other parameters.
    """
    if recipe.init_from is None or not recipe.init_from.continues:
        return Progress(num_steps=num_steps)
    path = Path(recipe.init_from.path)
    if find_origin(path).what != "checkpoint":
        raise _refused(f"`{path}` is no checkpoint", f"one of {path}/checkpoints/step-...")
    kept = Checkpoints(path.parent, keep=1).load(step_of(path), learner)
    if kept.step >= num_steps:
        raise _refused(
            f"`{path}` is at step {kept.step}, and the run ends at step {num_steps}", "`train.steps` counts from the trunk's first"
        )
    fresh = Progress(num_steps=num_steps)
    return replace(
        fresh,
        step=kept.step,
        batch_chain=kept.batch_chain,
        tokens=kept.tokens,
        targets=kept.targets,
        seconds=kept.seconds,
        pending=kept.pending,
    )


def schedule_of(recipe: Recipe, num_steps: int) -> Schedule:
    """The recipe's schedule; of a branch off an `infinite` one, as it goes on from its trunk."""
    schedule = recipe.train.schedule
    if schedule.kind != "infinite" or recipe.init_from is None or not recipe.init_from.continues:
        return schedule
    return schedule.in_branch(step_of(Path(recipe.init_from.path)), num_steps)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _refused(what: str, hint: str) -> RequestError:
    return RequestError("the run cannot go on from this", [Problem("init_from.continues", what, hint)])
