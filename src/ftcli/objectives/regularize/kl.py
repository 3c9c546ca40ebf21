"""KL: the predictions stay near those of a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ftcli.errors import Problem, RequestError
from ftcli.objectives.regularize.regularizer import RegularizerSettings, Role, sources_with
from ftcli.spec import ModelReference, Spec

if TYPE_CHECKING:
    from ftcli.objectives.regularize.regularizer import AtWork, RegularizeContext


class TopK(Spec):
    """The teacher's answers, computed once for every target and kept on disk."""

    top_k: int = Field(default=64, ge=1)
    """Likeliest tokens that are kept of each answer, the rest as one number; a larger value is more exact and takes more disk."""


class KL(RegularizerSettings):
    """weight x T² x KL between a teacher's predictions of the targets and the model's own, both softened by the temperature T.

    With an adapter the teacher `base` is the model itself with its adapter off; otherwise it is the model with the weights that it
    started with, so that a copy of the trained weights is all that is held. Costs the teacher's forward pass, about a third more
    time, and none with `cache`. Logits are held for a few targets at a time. The most direct hold on what a model says: on `replay`
    targets it keeps the base's predictions where they should stay, on `new` ones it slows the learning down as well: there take a
    weight of 0.1 or less. It is 0 at the first step where the model begins as its teacher does; a soft prompt or a prefix begins as
    something else than the base, and is drawn to say nothing: there `teacher: start` holds what it began with.

    With `cache` all tokens but the `top_k` count as one, as which the penalty is smaller by the tail's share p_rest times the KL
    within the tail, and never larger than the exact one.

    Source: Li and Hoiem 2016, arXiv:1606.09282 (learning without forgetting), with the T² of Hinton et al. 2015, arXiv:1503.02531.
    """

    kind: Literal["kl"] = "kl"
    weight: float = Field(default=1.0, ge=0)
    """Nats of the penalty for one of KL; a larger value holds more firmly, and 0 costs nothing."""
    temperature: float = Field(default=1.0, gt=0)
    """T; a larger value gives unlikely tokens more say."""
    direction: Literal["forward", "reverse"] = "forward"
    """`forward` is KL(teacher ‖ model): all that the teacher finds likely stays likely; `reverse` is KL(model ‖ teacher): nothing
    becomes likely that the teacher does not find so."""
    on: Role = "all"
    """The role of the training sources whose targets are held."""
    teacher: Literal["base", "start"] | ModelReference = "base"
    """`base`, `start` (what the run began with, which `init_from` makes another), or a model of the same vocabulary."""
    cache: TopK | None = None
    """Compute the teacher's answers once, before the first step."""

    def held_sources(self, roles: Sequence[str]) -> list[int]:
        """Indices of the training sources whose targets are held.

        Raises:
            RequestError: there are none.
        """
        if not (sources := sources_with(self.on, roles)):
            problem = Problem("objective.regularize.on", f"no training source has `role: {self.on}`", "`on: all`, or a source of this role")
            raise RequestError("`kl` has nothing to hold", [problem])
        return sources

    def build(self, name: str, context: RegularizeContext) -> AtWork:
        """The divergence from the teacher.

        Raises:
            RequestError: no training source has the role, or the teacher cannot be had or has another vocabulary.
        """
        from ftcli.objectives.regularize.divergence import Divergence

        sources = self.held_sources(context.roles)
        teacher = context.teacher(self.teacher)
        cached = None if self.cache is None else context.cached(teacher, self.teacher, sources, self.cache.top_k, self.temperature)
        return Divergence(
            name,
            weight=self.weight,
            temperature=self.temperature,
            is_reverse=self.direction == "reverse",
            sources=frozenset(sources),
            answers=teacher if cached is None else cached,
        )
