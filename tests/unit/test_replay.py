"""New text and replay: the share of new tokens holds in every window of the run, whatever the lengths of the examples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ftcli.data.mixtures import Mixture
from ftcli.data.mixtures.passes import Passes
from ftcli.data.mixtures.replay import Replay, ShareSchedule
from ftcli.data.order import Order
from ftcli.data.settings import Data
from ftcli.errors import RecipeError
from ftcli.recipe.load import load_recipe
from ftcli.reporting.mixture import mixture_blocks
from ftcli.reporting.page import Table

WINDOW = 1000
MAX_LENGTH = 1024


def source_lengths(size: int, kind: str, seed: int = 0) -> NDArray[np.int32]:
    generator = np.random.default_rng(seed)
    drawn = {
        "equal": np.full(size, MAX_LENGTH),
        "uniform": generator.integers(2, MAX_LENGTH + 1, size),
        "short": generator.integers(2, 100, size),
        "heavy": np.clip(generator.pareto(1.1, size) * 20 + 2, 2, MAX_LENGTH),
    }
    return drawn[kind].astype(np.int32)


def make_order(lengths: list[NDArray[np.int32]], mixture: Mixture, weights: list[float] | None = None, **given: Any) -> Order:
    """The first source is new, all others are replayed."""
    given = {"global_batch_size": 32, "seed": 3, "roles": ["new"] + ["replay"] * (len(lengths) - 1)} | given
    means = [float(tokens.mean()) for tokens in lengths]
    return Order([len(tokens) for tokens in lengths], means, weights or [1.0] * len(lengths), mixture, lengths=lengths, **given)


def stream(order: Order) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(source, tree, step) of every position of the run."""
    rows = [(source, tree, step) for step in range(1, order.num_steps + 1) for source, tree in order.examples_at(step)]
    sources, trees, steps = np.array(rows).T
    return sources, trees, steps


def tokens_of(lengths: list[NDArray[np.int32]], sources: NDArray[np.int64], trees: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.array([lengths[source][tree] for source, tree in zip(sources, trees, strict=True)], dtype=np.float64)


SCHEDULES: dict[str, Any] = {
    "default": ShareSchedule(),
    "cosine": ShareSchedule(shape="cosine"),
    "steps": ShareSchedule(shape="steps"),
    "falling": ShareSchedule(**{"from": 1.0, "to": 0.1}),
    "fixed": 0.95,
    "little": 0.02,
}


@pytest.mark.parametrize("kinds", [("uniform", "uniform"), ("heavy", "short"), ("equal", "heavy", "short")])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_share_is_in_the_binomial_interval_of_every_window(name: str, kinds: tuple[str, ...]) -> None:
    lengths = [source_lengths(5000, kind, seed) for seed, kind in enumerate(kinds)]
    schedule = SCHEDULES[name]
    order = make_order(lengths, Replay(share_of_new=schedule), steps=250)
    sources, trees, steps = stream(order)
    tokens = tokens_of(lengths, sources, trees)
    progress = (steps - 1) / (order.num_steps - 1)
    share = np.array([schedule.share_at(at) if isinstance(schedule, ShareSchedule) else schedule for at in progress])
    new, aimed, whole = (np.concatenate([[0.0], np.cumsum(part)]) for part in (tokens * (sources == 0), tokens * share, tokens))
    new, aimed, whole = (part[WINDOW:] - part[:-WINDOW] for part in (new, aimed, whole))  # every window of the run
    assert len(whole) == 250 * 32 - WINDOW + 1
    expected, realised = aimed / whole, new / whole
    # one example is the least by which a share can be missed, and may be more than the interval
    interval = np.maximum(1.96 * np.sqrt(expected * (1 - expected) / WINDOW), MAX_LENGTH / whole)
    assert (np.abs(realised - expected) <= interval + 1e-9).all()
    # the interval is what chance would need; this is no chance
    assert (np.abs(new - aimed) <= 2 * MAX_LENGTH).all()


def test_replayed_sources_share_by_weight_in_tokens() -> None:
    lengths = [source_lengths(5000, kind, seed) for seed, kind in enumerate(("uniform", "short", "equal"))]
    order = make_order(lengths, Replay(share_of_new=0.5), weights=[1.0, 3.0, 1.0], steps=100)
    sources, trees, _ = stream(order)
    tokens = tokens_of(lengths, sources, trees)
    shares = [tokens[sources == source].sum() / tokens.sum() for source in range(3)]
    assert shares == pytest.approx([0.5, 0.375, 0.125], abs=0.001)
    assert order.planned_shares() == pytest.approx([0.5, 0.375, 0.125], abs=0.001)


def test_any_step_is_there_without_the_steps_before_it() -> None:
    lengths = [source_lengths(3000, "uniform"), source_lengths(700, "heavy")]
    whole = make_order(lengths, Replay(), steps=1500)
    expected = {step: whole.examples_at(step) for step in range(1, 1501)}
    for step in (1, 2, 700, 1499, 1500):
        assert make_order(lengths, Replay(), steps=1500).examples_at(step) == expected[step]
    backwards = make_order(lengths, Replay(), steps=1500)
    assert all(backwards.examples_at(step) == expected[step] for step in (1500, 3, 800, 1))
    assert make_order(lengths, Replay(), steps=1500, seed=4).examples_at(9) != expected[9]


def test_a_source_is_seen_whole_before_any_of_it_again() -> None:
    lengths = [source_lengths(2000, "uniform"), source_lengths(10, "heavy")]
    sources, trees, _ = stream(make_order(lengths, Replay(share_of_new=0.5), steps=50))
    small = trees[sources == 1]
    assert len(small) > 100
    for first in range(0, len(small) - 10, 10):
        assert sorted(small[first : first + 10]) == list(range(10))


def test_replay_takes_the_place_of_new_tokens_or_comes_on_top() -> None:
    lengths = [source_lengths(4000, "uniform", 1), source_lengths(4000, "uniform", 2)]
    new = int(lengths[0].sum())
    tokens: dict[str, Counter[int]] = {}
    for accounting in ("replace", "add"):
        sources, trees, _ = stream(make_order(lengths, Replay(share_of_new=0.8, accounting=accounting), epochs=1))
        counted = tokens_of(lengths, sources, trees)
        tokens[accounting] = Counter({source: int(counted[sources == source].sum()) for source in (0, 1)})
    assert tokens["replace"].total() == pytest.approx(new, rel=0.01)
    assert tokens["replace"][0] == pytest.approx(0.8 * new, rel=0.01)
    assert tokens["add"][0] == pytest.approx(new, rel=0.01)
    assert tokens["add"].total() == pytest.approx(new / 0.8, rel=0.01)


@pytest.mark.parametrize(
    ("mixture", "counts_all"), [(Passes(), True), (Replay(share_of_new=0.5), True), (Replay(share_of_new=0.5, accounting="add"), False)]
)
def test_a_run_has_as_many_tokens_as_it_is_told(mixture: Mixture, counts_all: bool) -> None:
    lengths = [source_lengths(4000, "uniform", 1), source_lengths(4000, "short", 2)]
    sources, trees, _ = stream(make_order(lengths, mixture, max_tokens=300_000))
    tokens = tokens_of(lengths, sources, trees)
    assert tokens[(sources == 0) | counts_all].sum() == pytest.approx(300_000, rel=0.04)


def test_one_step_and_one_example_are_enough() -> None:
    lengths = [source_lengths(1, "uniform"), source_lengths(1, "short")]
    assert len(make_order(lengths, Replay(), steps=1, global_batch_size=1).examples_at(1)) == 1
    sources, _, _ = stream(make_order(lengths, Replay(share_of_new=1.0), steps=3, global_batch_size=5))
    assert (sources == 0).all()


def test_the_mixture_is_replay_where_some_are_replayed_and_none_says_how_much() -> None:
    def mixture(**replayed: Any) -> Mixture:
        new, old = ({"source": {"kind": "builtin", "name": name}} for name in ("clinic", "stories"))
        return Data.model_validate({"train": (new, old | replayed)}).mixture

    assert mixture(role="replay") == Replay(share_of_new=ShareSchedule(**{"from": 0.25, "to": 0.8, "shape": "linear"}))
    assert mixture(role="replay", weight=0.1) == mixture() == Passes()
    assert Data.model_validate({"train": ({"source": {"kind": "builtin", "name": "clinic"}, "role": "replay"},)}).mixture == Passes()


@pytest.mark.parametrize(
    ("mixture", "what"),
    [
        ("{kind: replay, share_of_new: 1.5}", "data.mixture.share_of_new (line 8, column 27): found `1.5`, allowed: a number above 0"),
        ("{kind: replay, share_of_new: {form: 0.3}}", "data.mixture.share_of_new.form (line 8, column 42): unknown key"),
        ("{kind: replay, accounting: add}", "`add` is about `epochs` and `max_tokens`; `train.steps` counts every step"),
        ("{kind: replay}\n  holdout: 0.1", None),
    ],
)
def test_a_wrong_mixture_is_told_once(tmp_path: Path, mixture: str, what: str | None) -> None:
    path = tmp_path / "replay.yaml"
    sources = "    - {source: {kind: builtin, name: clinic}}\n    - {source: {kind: builtin, name: stories}, role: replay}\n"
    head = "version: 1\nname: a\nmodel: {base: 'builtin:tiny'}\ndata:\n  train:\n"
    path.write_text(f"{head}{sources}  mixture: {mixture}\ntrain: {{steps: 3}}\n")
    if what is None:
        assert isinstance(load_recipe(path).recipe.data.mixture, Replay)
        return
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert "has 1 problem" in str(error.value)
    assert what in str(error.value)


@pytest.mark.parametrize("role", ["new", "replay"])
def test_a_weight_that_is_weighed_against_nothing_is_refused(tmp_path: Path, role: str) -> None:
    path = tmp_path / "replay.yaml"
    weights = {"new": "", "replay": "", role: ", weight: 2"}
    path.write_text(
        "version: 1\nname: a\nmodel: {base: 'builtin:tiny'}\ndata:\n  mixture: {kind: replay}\n  train:\n"
        f"    - {{source: {{kind: builtin, name: clinic}}{weights['new']}}}\n"
        f"    - {{source: {{kind: builtin, name: stories}}, role: replay{weights['replay']}}}\n"
    )
    with pytest.raises(RecipeError, match=f"there is no other source with `role: {role}` to be weighed against"):
        load_recipe(path)


def test_the_report_tells_what_was_seen_of_each_source() -> None:
    entry = {"name": "new", "role": "new", "tokens": 1234, "share": 0.62, "share_planned": 0.6, "passes": 1.5, "first_loss": 3.0}
    [table] = mixture_blocks({"mixture": [entry, {**entry, "name": "old", "last_loss": 2.0}]})
    assert isinstance(table, Table)
    assert table.rows[0] == ["new", "new", "1,234", "62.0%", "60.0%", "1.50", "3.000", "-"]
    assert table.rows[1][-1] == "2.000"
    assert mixture_blocks({"mixture": [entry]}) == mixture_blocks({}) == []
