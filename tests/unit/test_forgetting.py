"""Backward transfer and forgetting over stages, on matrices made by hand."""

from __future__ import annotations

import pytest

from ftcli.evaluation.forgetting import retention

# Stage 0 is the base; three tasks learnt one after the other, and one (the last column) that the base could do before.
MATRIX = [
    [0.1, 0.2, 0.1, 0.8],
    [0.9, 0.3, 0.1, 0.7],
    [0.6, 0.8, 0.3, 0.6],
    [0.5, 0.9, 0.7, 0.4],
]
LEARNT_AT = [1, 2, 3, 0]


def test_the_measures_of_a_matrix_made_by_hand() -> None:
    found = retention(MATRIX, LEARNT_AT)
    assert found.average == pytest.approx((0.5 + 0.9 + 0.7 + 0.4) / 4)
    assert found.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.9 - 0.8) + (0.4 - 0.8)) / 3)
    assert found.forgetting == pytest.approx(((0.9 - 0.5) + (0.8 - 0.9) + (0.8 - 0.4)) / 3)
    assert found.forward_transfer == pytest.approx(((0.3 - 0.2) + (0.3 - 0.1)) / 2)
    assert found.tasks[1].forgetting == pytest.approx(-0.1)


def test_no_change_is_no_forgetting_and_no_transfer() -> None:
    found = retention([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], [1, 2])
    assert (found.backward_transfer, found.forgetting, found.forward_transfer) == (0.0, 0.0, 0.0)


def test_backward_transfer_is_minus_forgetting_where_the_peak_is_right_after_learning() -> None:
    found = retention([[0.0, 0.0], [0.9, 0.1], [0.4, 0.8]], [1, 2])
    assert found.backward_transfer == pytest.approx(-0.5)
    assert found.forgetting == pytest.approx(0.5)


def test_a_peak_between_the_stages_counts_as_forgotten_and_not_as_transfer() -> None:
    found = retention([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.9, 0.5, 0.0], [0.5, 0.5, 0.5]], [1, 2, 3])
    assert found.backward_transfer == pytest.approx(0.0)
    assert found.forgetting == pytest.approx((0.4 + 0.0) / 2)


def test_what_is_known_before_it_is_learnt_is_not_forgotten() -> None:
    assert retention([[0.9], [0.2], [0.2]], [1]).forgetting == 0.0


def test_what_was_not_measured_is_left_out() -> None:
    found = retention([[None, None], [0.9, None], [0.7, 0.8]], [1, 2])
    assert found.backward_transfer == pytest.approx(-0.2)
    assert found.forward_transfer is None
    assert retention([[None], [0.5]], [1]).forgetting is None
    assert retention([[0.25], [0.5]], [0]).backward_transfer == 0.25


@pytest.mark.parametrize(("matrix", "learnt_at"), [([[0.1, 0.2]], [0]), ([[0.1]], [1]), ([[0.1]], [-1]), ([], [])])
def test_a_matrix_that_does_not_fit_its_tasks_is_refused(matrix: list[list[float]], learnt_at: list[int]) -> None:
    with pytest.raises(ValueError, match=r"columns|stages"):
        retention(matrix, learnt_at)
