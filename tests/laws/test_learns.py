"""Law 10: every method learns - a tiny random model memorises eight examples - and so it does with every optimizer and schedule."""

from __future__ import annotations

from typing import Any

import pytest

from ftcli.methods.full import Full
from ftcli.optim.optimizers import Optimizer
from ftcli.optim.schedules import Schedule
from tests.laws.registered import Bench, choices, described, language_methods, make_bench, union_members

LR = 1e-2
# Where an optimizer's updates are not as large as Adam's at the same learning rate.
LR_OF = {"sgd": 0.3, "lion": 2e-3, "galore": 4e-2, "apollo": 2e-2}
# A few hundred numbers inside a frozen random model cannot hold eight sentences: these have to halve the loss, at their own rate.
HALVING = {"bitfit": 0.1, "norms": 0.1, "ia3": 0.1, "p_tuning": 1e-2, "prefix": 0.1, "prompt": 0.3}
# AdaLoRA's update is divided by its rank, and its factors are small on both sides at the start; a head alone has further to go.
METHOD_LR = {"adalora": 3e-2, "adapter": 3e-2, "head": 3e-2}
# The width of a bottleneck is a share of the model's: in this narrow one it takes the whole to hold eight sentences.
FITTED = {"adapter": {"reduction_factor": 1.0}, "adamix": {"reduction_factor": 1.0}}
# Each of four experts gets its turn in a quarter of the steps.
TURNS = {"adamix": 4}
MEMORISED_LOSS, MEMORISING_STEPS = 0.1, 60  # nats per target; a guess among the 3072 tokens costs 8 nats


def kind_of(member: Any) -> str:
    """What the recipe calls it."""
    return str(member.model_fields["kind"].default)


ALL_CHOICES = [settings for member in language_methods() if kind_of(member) not in HALVING for settings in choices(member)]


def fitted(method: Any) -> Any:
    """The method with what it needs in a model this small."""
    return method.model_copy(update=FITTED.get(method.kind, {}))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("learns"), lr=LR)


@pytest.mark.parametrize("method", [member() for member in language_methods() if kind_of(member) in HALVING], ids=described)
def test_a_method_with_few_parameters_halves_the_loss(method: Any, bench: Bench) -> None:
    losses = bench.with_train(lr=HALVING[method.kind]).run(method, MEMORISING_STEPS).losses
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("method", [member() for member in language_methods() if kind_of(member) not in HALVING], ids=described)
def test_every_method_memorises_eight_examples(method: Any, bench: Bench) -> None:
    num_steps = MEMORISING_STEPS * TURNS.get(method.kind, 1)
    fast = bench.with_train(lr=METHOD_LR.get(method.kind, LR))
    losses = fast.run(fitted(method), num_steps, stop=lambda loss: loss < MEMORISED_LOSS).losses
    assert losses[0] > 8
    assert losses[-1] < MEMORISED_LOSS


@pytest.mark.parametrize("method", ALL_CHOICES, ids=described)
def test_every_choice_a_method_offers_learns(method: Any, bench: Bench) -> None:
    num_steps = 12 * TURNS.get(method.kind, 1)
    losses = bench.with_train(lr=METHOD_LR.get(method.kind, LR)).run(fitted(method), num_steps, stop=lambda loss: loss < 2).losses
    assert losses[-1] < 2


@pytest.mark.parametrize("optimizer", [settings for member in union_members(Optimizer) for settings in choices(member)], ids=described)
def test_every_optimizer_learns(optimizer: Any, bench: Bench) -> None:
    losses = bench.with_train(optimizer=optimizer, lr=LR_OF.get(optimizer.kind, LR)).run(Full(), 12).losses
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("schedule", [settings for member in union_members(Schedule) for settings in choices(member)], ids=described)
def test_every_schedule_learns(schedule: Any, bench: Bench) -> None:
    losses = bench.with_train(schedule=schedule).run(Full(), 12).losses
    assert losses[-1] < 0.5 * losses[0]
