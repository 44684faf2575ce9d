"""A staged pipeline with bounds: nothing is lost, nothing hangs, every item ends once, whatever fails or dies."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import pytest

import rtml
from tests.acceptance.stages import BOUNDS, STAGES, Span, ends, rollout
from tests.integration.engine import children_of_this, processes

ITEMS = 150


def most_at_once(spans: Sequence[Span]) -> int:
    """How many of the spans overlap at most."""
    changes = sorted([(span.begin, 1) for span in spans] + [(span.end, -1) for span in spans])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def engine(link: Literal["unix", "zmq"]) -> rtml.Client:
    return rtml.connect(workers=6, cpu=2.0, link=link, logs=False, resources=dict(BOUNDS))


def check(outcomes: list[tuple[int, str, list[Span]]]) -> None:
    """Each item once, as it was planned, through all stages in their order and within their bounds."""
    assert Counter(item for item, _, _ in outcomes) == Counter(range(ITEMS))
    assert {item: how for item, how, _ in outcomes} == {item: ends(item) for item in range(ITEMS)}
    spans = [span for _, _, spans in outcomes for span in spans]
    for name, bound in BOUNDS.items():
        most = most_at_once([span for span in spans if span.stage == name])
        assert 1 <= most <= bound, (name, most)
    for _, how, of_item in outcomes:
        if how == "done":
            assert [span.stage for span in of_item] == list(STAGES)
            assert all(one.end <= other.begin for one, other in pairwise(of_item))


@pytest.mark.parametrize("link", ["unix", "zmq"])
def test_every_item_ends_exactly_once(link: Literal["unix", "zmq"]) -> None:
    with engine(link):
        futures = [rollout.submit(item) for item in range(ITEMS)]
        check([future.result() for future in rtml.as_completed(futures, timeout=60)])


@pytest.mark.parametrize("victim", ["executor", "dispatcher"])
def test_a_process_killed_in_the_middle_changes_nothing(victim: str) -> None:
    with engine("unix"):
        (supervisor,) = children_of_this()
        futures = [rollout.submit(item) for item in range(ITEMS)]
        outcomes = []
        for number, future in enumerate(rtml.as_completed(futures, timeout=60)):
            outcomes.append(future.result())
            if number == ITEMS // 3:
                os.kill(processes(supervisor)[victim][0], signal.SIGKILL)
        check(outcomes)
