"""When a gateway that is behind refuses, and what that is worth: with times that the tests make."""

from __future__ import annotations

import heapq
import random
from typing import NamedTuple

import pytest

from rtml.serving.pressure import Pressure

#: Seconds of the loop: to look at a request, to begin to answer it, and to send what its result is.
LOOK, BEGIN, END = 20e-6, 115e-6, 60e-6
CAPACITY = 1 / (LOOK + BEGIN + END)
BUDGET = 0.05
#: Seconds that the engine takes.
ENGINE = 0.002


class Outcome(NamedTuple):
    """Of all requests."""

    #: Answers in time, as part of what the loop can do.
    goodput: float
    #: Of those that were let in.
    missed: float
    refused: int


def gateway(load: float, *, refusing: bool, burst: float = 1.0, seconds: float = 2.0) -> Outcome:
    """A loop as uvloop's: it reads all that has come, and then does all that there is to do. Times are virtual."""
    rng = random.Random(7)
    arrivals: list[float] = []
    now = 0.0
    while now < seconds:
        now += rng.expovariate(load * CAPACITY / burst)
        arrivals += [now] * (1 + int(rng.expovariate(1 / (burst - 1)) if burst > 1 else 0))
    pressure = Pressure()
    results: list[tuple[float, float, float, bool]] = []
    now = taken = good = late = refused = 0
    while taken < len(arrivals) or results:
        first = min([*arrivals[taken : taken + 1], *(result[0] for result in results[:1])])
        pressure.busy = first <= now
        now = max(now, first)
        look, pressure.reading = now, False
        begun: list[tuple[float, float, bool]] = []
        ended: list[tuple[float, float, float, bool]] = []
        while results and results[0][0] <= look:
            ended.append(heapq.heappop(results))
        while taken < len(arrivals) and arrivals[taken] <= look:
            now += LOOK
            came = arrivals[taken]
            taken += 1
            since = pressure.read(now)
            needed = pressure.behind(since, now)
            if refusing and needed and pressure.refuses(needed, BUDGET):
                refused += 1
                continue
            pressure.queued += 1
            begun.append((came, since, bool(needed) and pressure.teaches(needed, BUDGET)))
        for came, since, teaches in begun:
            now += BEGIN
            heapq.heappush(results, (now + ENGINE, came, since, teaches))
        for _, came, since, teaches in ended:
            now += END
            if teaches:
                pressure.ended(now - since <= BUDGET)
            if now - came <= BUDGET:
                good += 1
            else:
                late += 1
    return Outcome(good / seconds / CAPACITY, late / max(1, good + late), refused)


@pytest.mark.parametrize("burst", [1.0, 10.0], ids=["poisson", "bursts"])
def test_twice_what_the_loop_can_do_is_mostly_answered_in_time(burst: float) -> None:
    found = gateway(2.0, refusing=True, burst=burst)
    # A refusal takes a tenth of an answer's time here, and there is one for each answer and more: 0.89 is all there is.
    assert found.goodput > 0.82
    assert found.missed < 0.01


@pytest.mark.parametrize("burst", [1.0, 10.0], ids=["poisson", "bursts"])
def test_without_refusals_nothing_is(burst: float) -> None:
    assert gateway(2.0, refusing=False, burst=burst).goodput < 0.1


def test_a_gateway_that_is_not_behind_refuses_nothing() -> None:
    found = gateway(0.8, refusing=True)
    assert found.refused == 0
    assert found.missed == 0


def test_a_little_too_much_costs_a_little() -> None:
    found = gateway(1.2, refusing=True)
    assert found.goodput > 0.9
    assert found.missed < 0.01


def turn(pressure: Pressure, now: float, *, idle: bool = False) -> float:
    """The loop reads something, as the first thing in a turn; since when it may have been there."""
    pressure.have_read()
    if idle:
        pressure.done()
    return pressure.read(now)


def test_what_comes_while_the_loop_works_may_have_come_at_the_beginning() -> None:
    pressure = Pressure()
    turn(pressure, 1.0)
    assert turn(pressure, 1.04) == 1.0
    # And all that is read in that turn.
    assert pressure.read(1.05) == 1.0
    assert pressure.behind(1.0, 1.05) > 0.05
    # What comes while that is done came after it had been looked for.
    assert turn(pressure, 1.0605) == 1.04


def test_what_wakes_an_idle_loop_has_just_come() -> None:
    pressure = Pressure()
    turn(pressure, 1.0)
    assert turn(pressure, 1.04, idle=True) == 1.04
    assert not pressure.behind(1.04, 1.0401)


def test_each_that_is_let_in_makes_the_next_one_wait() -> None:
    pressure = Pressure()
    turn(pressure, 1.0)
    assert not pressure.behind(1.0, 1.0)
    pressure.queued = 100
    needed = pressure.behind(1.0, 1.0)
    assert needed == pytest.approx(2 * 100 * pressure.cost)
    assert not pressure.refuses(needed, 1.0)
    assert pressure.refuses(needed, 0.05) == pytest.approx(needed * pressure.factor - 0.05)


def test_the_cost_of_a_request_is_learned_from_busy_turns() -> None:
    pressure = Pressure()
    now = 1.0
    turn(pressure, now)
    for _ in range(100):
        pressure.queued = 10
        now += 0.01
        turn(pressure, now)
    assert pressure.cost == pytest.approx(0.001, rel=0.05)
    # An idle one says nothing.
    pressure.queued = 10
    turn(pressure, now + 1.0, idle=True)
    assert pressure.cost == pytest.approx(0.001, rel=0.05)


def test_a_machine_that_stands_still_does_not_close_the_gateway() -> None:
    pressure = Pressure()
    now = 1.0
    turn(pressure, now)
    # Half a second for four requests each time, and all of them late.
    for _ in range(200):
        pressure.queued = 4
        now += 0.5
        turn(pressure, now)
        pressure.ended(kept=False)
    # The first one after an idle moment is let in all the same,
    now += 1.0
    since = turn(pressure, now, idle=True)
    assert not pressure.behind(since, now)
    # and those show how it is now, one by one.
    for _ in range(60):
        pressure.queued = 1
        now += 0.0003
        turn(pressure, now)
    assert pressure.cost < 0.0004


def test_broken_promises_make_it_careful_and_kept_ones_less_so() -> None:
    pressure = Pressure()
    first = pressure.factor
    pressure.ended(kept=False)
    careful = pressure.factor
    assert careful > first
    for _ in range(200):
        pressure.ended(kept=True)
    assert first < pressure.factor < careful
    for _ in range(1000):
        pressure.ended(kept=False)
    assert pressure.refuses(0.02, 0.05)
    assert not pressure.refuses(0.005, 0.05)
