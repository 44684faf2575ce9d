"""A population of trials that report, pause, checkpoint, clone and resume, while processes are killed.

The final result is computed once without an engine, and must come out the same however the trials were spread, paused
and killed. As actors on one engine, and as tasks that hand checkpoints from node to node.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import rtml
from tests.acceptance.trials import Board, Trial, advanced, begin, clone, cloned, exploit, resume, score, train
from tests.integration.engine import children_of_this, processes
from tests.integration.test_nodes import cluster

TRIALS, GENERATIONS, STEPS, SLOTS = 6, 4, 12, 3


def expected() -> dict[int, float]:
    """The population's last scores, without an engine."""
    population = {trial: begin(trial) for trial in range(TRIALS)}
    scores: dict[int, float] = {}
    for generation in range(GENERATIONS):
        population = {trial: advanced(checkpoint, STEPS) for trial, checkpoint in population.items()}
        scores = {trial: score(checkpoint) for trial, checkpoint in population.items()}
        before = dict(population)
        for worst, best, factor in exploit(scores):
            population[worst] = cloned(before[best], factor, 100 * (generation + 1) + worst)
    return scores


# --- as actors --------------------------------------------------------------------------------------------------------


def one_trial(_: int, trials: list[int], __: int) -> list[int]:
    return trials[-1:]


def all_trials(_: int, trials: list[int], __: int) -> list[int]:
    return trials


def the_board(_: int, __: list[int], board: int) -> list[int]:
    return [board]


def the_dispatcher(supervisor: int, _: list[int], __: int) -> list[int]:
    return processes(supervisor)["dispatcher"]


def nothing(_: int, __: list[int], ___: int) -> list[int]:
    return []


@pytest.mark.parametrize("victims", [nothing, one_trial, all_trials, the_board, the_dispatcher])
def test_actors_report_pause_clone_and_resume(victims: Callable[[int, list[int], int], list[int]]) -> None:
    with rtml.connect(workers=2):
        (supervisor,) = children_of_this()
        board = Board.create()
        saved: dict[int, Any] = dict.fromkeys(range(TRIALS))
        for generation in range(GENERATIONS):
            for first in range(0, TRIALS, SLOTS):
                chosen = range(first, first + SLOTS)
                # Paused trials are nothing but the futures of their checkpoints; each resumes in a new process.
                running = {trial: Trial.create(trial, board, saved[trial]) for trial in chosen}
                pids = rtml.get([handle.pid.submit() for handle in running.values()], timeout=60)
                there = board.pid.submit().result(60)
                steps = [running[trial].step.submit() for _ in range(STEPS) for trial in chosen]
                rtml.wait(steps, num_returns=len(steps) // 3)
                if generation in {1, 2}:
                    for pid in victims(supervisor, pids, there):
                        os.kill(pid, signal.SIGKILL)
                assert rtml.get(steps, timeout=60)[-1] == (generation + 1) * STEPS
                for trial in chosen:
                    saved[trial] = running[trial].save.submit()
                rtml.get([rtml.stop(handle) for handle in running.values()], timeout=60)
            scores = last_scores(rtml.get_actor("board").read.submit().result(60), generation)
            before = dict(saved)
            for worst, best, factor in exploit(scores):
                heir = Trial.create(worst, board)
                heir.become.submit(before[best], factor, 100 * (generation + 1) + worst)
                saved[worst] = heir.save.submit()
        assert scores == expected()


def last_scores(reports: dict[tuple[int, int], list[float]], generation: int) -> dict[int, float]:
    """The scores at the end of a generation. Every step of every trial was reported, and always with one value."""
    assert set(reports) == {(trial, step + 1) for trial in range(TRIALS) for step in range((generation + 1) * STEPS)}
    assert all(len(set(values)) == 1 for values in reports.values())
    return {trial: reports[trial, (generation + 1) * STEPS][0] for trial in range(TRIALS)}


# --- as tasks that hand checkpoints on, over nodes --------------------------------------------------------------------


@contextmanager
def nodes(kill: bool) -> Iterator[Callable[[int], None]]:
    """Three nodes; with `kill`, one is killed in the middle, and another one joins."""
    with cluster(3) as found, found.connect():

        def disturb(generation: int) -> None:
            if kill and generation == 1:
                found.processes["n0"].kill()
                found.processes["n0"].wait()
                found.add("late")

        yield disturb


@pytest.mark.parametrize("kill", [False, True])
def test_tasks_clone_and_resume_on_other_nodes(kill: bool) -> None:
    with nodes(kill) as disturb:
        population: dict[int, Any] = {trial: train.submit(begin(trial), 0) for trial in range(TRIALS)}
        moved = 0
        for generation in range(GENERATIONS):
            running = {resume.submit(population[trial], STEPS): trial for trial in range(TRIALS)}
            disturb(generation)
            scores = {}
            for future in rtml.as_completed(running, timeout=60):
                checkpoint, before, now = future.result()
                trial = running[future]
                scores[trial] = score(checkpoint)
                population[trial] = (checkpoint, now)
                moved += before != now
            sources = dict(population)
            for worst, best, factor in exploit(scores):
                population[worst] = clone.submit(sources[best], factor, 100 * (generation + 1) + worst)
        assert scores == expected()
        assert moved > 0
