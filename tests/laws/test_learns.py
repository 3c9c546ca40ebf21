"""Law 10: every method learns - a tiny random model memorises eight examples - and so it does with every optimizer and schedule."""

from __future__ import annotations

from typing import Any

import pytest

from ftcli.methods import Method
from ftcli.methods.full import Full
from ftcli.optim.optimizers import Optimizer
from ftcli.optim.schedules import Schedule
from tests.laws.registered import Bench, choices, described, make_bench, union_members

LR = 1e-2
# Where an optimizer's updates are not as large as Adam's at the same learning rate.
LR_OF = {"sgd": 0.3, "lion": 2e-3}
MEMORISED_LOSS, MEMORISING_STEPS = 0.1, 60  # nats per target; a guess among the 3072 tokens costs 8 nats
ALL_CHOICES = [settings for member in union_members(Method) for settings in choices(member)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("learns"), lr=LR)


@pytest.mark.parametrize("method", [member() for member in union_members(Method)], ids=described)
def test_every_method_memorises_eight_examples(method: Any, bench: Bench) -> None:
    losses = bench.run(method, MEMORISING_STEPS, stop=lambda loss: loss < MEMORISED_LOSS).losses
    assert losses[0] > 8
    assert losses[-1] < MEMORISED_LOSS


@pytest.mark.parametrize("method", ALL_CHOICES, ids=described)
def test_every_choice_a_method_offers_learns(method: Any, bench: Bench) -> None:
    losses = bench.run(method, 12, stop=lambda loss: loss < 2).losses
    assert losses[-1] < 2


@pytest.mark.parametrize("optimizer", [settings for member in union_members(Optimizer) for settings in choices(member)], ids=described)
def test_every_optimizer_learns(optimizer: Any, bench: Bench) -> None:
    losses = bench.with_train(optimizer=optimizer, lr=LR_OF.get(optimizer.kind, LR)).run(Full(), 12).losses
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("schedule", [settings for member in union_members(Schedule) for settings in choices(member)], ids=described)
def test_every_schedule_learns(schedule: Any, bench: Bench) -> None:
    losses = bench.with_train(schedule=schedule).run(Full(), 12).losses
    assert losses[-1] < 0.5 * losses[0]
