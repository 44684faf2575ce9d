"""What is learned about run times: one call's estimate, and the cost of batches."""

from __future__ import annotations

import random

import pytest

from rtml.graph.estimate import CALL_FLOOR, BatchCost, high_estimate


def learned(*seconds: float) -> float:
    estimate: float | None = None
    for one in seconds:
        estimate = high_estimate(estimate, one)
    assert estimate is not None
    return estimate


def fitted(*observations: tuple[int, float]) -> BatchCost:
    cost = BatchCost()
    for items, seconds in observations:
        cost.observe(items, seconds)
    return cost


def test_the_first_run_is_believed() -> None:
    assert learned(0.5) == 0.5 + CALL_FLOOR


def test_no_call_is_free() -> None:
    assert learned(*[0.0] * 1000) == CALL_FLOOR


def test_slow_runs_are_believed_at_once_and_fast_ones_slowly() -> None:
    assert learned(1.0, 2.0) == pytest.approx(1.25, rel=1e-4)
    assert learned(1.0, 0.0) == pytest.approx(0.99, rel=1e-4)
    assert learned(*[0.001] * 50, *[1.0] * 10) > 0.9
    assert learned(*[1.0] * 10, *[0.001] * 50) > 0.5


def test_it_settles_at_a_high_quantile() -> None:
    draw = random.Random(7)
    estimate = learned(*(draw.random() for _ in range(5000)))
    assert 0.75 < estimate < 0.97


def test_it_stays_within_what_was_seen() -> None:
    draw = random.Random(8)
    runs = [draw.uniform(0.2, 0.4) for _ in range(500)]
    assert 0.2 < learned(*runs) < 0.4 + CALL_FLOOR


def test_nothing_is_predicted_before_the_first_batch() -> None:
    assert BatchCost().predict(4) is None


@pytest.mark.parametrize(
    ("items", "seconds"),
    [(1, 0.1), (4, 0.1), (8, 0.2), (16, 0.4)],
)
def test_after_one_size_cost_is_in_proportion_and_never_below_it(items: int, seconds: float) -> None:
    cost = fitted(*[(4, 0.1)] * 5)
    assert cost.predict(items) == pytest.approx(seconds)


def test_two_sizes_give_a_line() -> None:
    cost = fitted(*[(1, 0.011), (8, 0.018)] * 10)
    assert cost.predict(1) == pytest.approx(0.011)
    assert cost.predict(4) == pytest.approx(0.014)
    assert cost.predict(32) == pytest.approx(0.042)


def test_a_batch_never_gets_cheaper_with_more_items() -> None:
    cost = fitted(*[(1, 0.02), (8, 0.01)] * 10)
    predictions = [cost.predict(items) for items in (1, 4, 8, 64)]
    assert all(0.01 < (one or 0.0) < 0.02 for one in predictions)
    assert predictions == sorted(predictions, key=lambda one: one or 0.0)


def test_a_batch_never_costs_less_than_nothing() -> None:
    cost = fitted(*[(4, 0.001), (8, 0.1)] * 10)
    assert cost.predict(1) == pytest.approx((0.1 - 0.001) / 4, rel=0.05)
    assert (cost.predict(0) or 0.0) >= 0.0


def test_a_new_machine_is_learned_and_the_old_forgotten() -> None:
    cost = fitted(*[(1, 1.0), (8, 8.0)] * 50, *[(1, 0.1), (8, 0.8)] * 100)
    assert cost.predict(4) == pytest.approx(0.4, rel=0.01)


def test_empty_batches_are_no_division_by_zero() -> None:
    assert fitted((0, 0.5), (1, 1.0)).predict(2) == pytest.approx(1.5)
    assert fitted((0, 0.5)).predict(2) == pytest.approx(0.5)
