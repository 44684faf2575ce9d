"""Trials for a population: as actors, and as tasks that hand checkpoints on. Where they run changes no result."""

from __future__ import annotations

import os
import random
import time
from typing import Any, NamedTuple

import rtml

SIZE = 32
TARGET = [2 * n / (SIZE - 1) - 1 for n in range(SIZE)]


class Checkpoint(NamedTuple):
    """Everything that a trial is."""

    weights: list[float]
    rate: float
    seed: int
    step: int = 0


def begin(trial: int) -> Checkpoint:
    drawn = random.Random(trial)
    return Checkpoint([drawn.gauss() for _ in range(SIZE)], 0.02 * (trial + 1), trial)


def advanced(checkpoint: Checkpoint, steps: int) -> Checkpoint:
    """Noisy gradient descent: `steps` more of them from here, the same wherever it runs."""
    weights, rate, seed, step = checkpoint
    for number in range(step, step + steps):
        noise = random.Random(1000 * seed + number)
        weights = [value - rate * (value - aim + noise.gauss(0, 0.1)) for value, aim in zip(weights, TARGET)]
    return Checkpoint(weights, rate, seed, step + steps)


def score(checkpoint: Checkpoint) -> float:
    return -sum((value - aim) ** 2 for value, aim in zip(checkpoint.weights, TARGET))


def exploit(scores: dict[int, float]) -> list[tuple[int, int, float]]:
    """The worst third continues from the best third, with another rate: (to, from, factor)."""
    order = sorted(scores, key=lambda trial: (scores[trial], trial))
    third = len(order) // 3
    return [(order[n], order[-1 - n], 1.2 if n % 2 else 0.8) for n in range(third)]


def cloned(source: Checkpoint, rate_factor: float, seed: int) -> Checkpoint:
    return source._replace(rate=source.rate * rate_factor, seed=seed)


class TrialClass:
    """A trial that works when told to; after the death of its process it is what it was after its last call."""

    def __init__(self, trial: int, board: Any, checkpoint: Checkpoint | None = None) -> None:
        self.trial = trial
        self.board = board
        self.checkpoint = begin(trial) if checkpoint is None else checkpoint

    def step(self) -> int:
        """One more step, reported to everybody. It takes a moment, so that kills meet it."""
        time.sleep(0.003)
        self.checkpoint = advanced(self.checkpoint, 1)
        self.board.report.submit(self.trial, self.checkpoint.step, score(self.checkpoint)).result()
        return self.checkpoint.step

    def save(self) -> Checkpoint:
        return self.checkpoint

    def become(self, other: Checkpoint, factor: float, seed: int) -> None:
        self.checkpoint = cloned(other, factor, seed)

    def pid(self) -> int:
        return os.getpid()

    def __rtml_save__(self) -> Checkpoint:
        return self.checkpoint

    def __rtml_restore__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint


class BoardClass:
    """What trials report. Reports that come again say the same."""

    def __init__(self) -> None:
        self.reports: dict[tuple[int, int], list[float]] = {}

    def report(self, trial: int, step: int, value: float) -> None:
        self.reports.setdefault((trial, step), []).append(value)

    def read(self) -> dict[tuple[int, int], list[float]]:
        return self.reports

    def pid(self) -> int:
        return os.getpid()

    def __rtml_save__(self) -> dict[tuple[int, int], list[float]]:
        return self.reports

    def __rtml_restore__(self, reports: dict[tuple[int, int], list[float]]) -> None:
        self.reports = reports


LASTS = {"max_restarts": -1, "max_task_retries": -1, "checkpoint_calls": 1}
Trial = rtml.actor(**LASTS)(TrialClass)
Board = rtml.actor(name="board", **LASTS)(BoardClass)


@rtml.task(retries=5)
def train(checkpoint: Checkpoint, steps: int) -> tuple[Checkpoint, str]:
    """Trains, and says on which node."""
    for _ in range(steps):
        checkpoint = advanced(checkpoint, 1)
    return checkpoint, str(os.getppid())


@rtml.task
def clone(source: tuple[Checkpoint, str], factor: float, seed: int) -> tuple[Checkpoint, str]:
    return cloned(source[0], factor, seed), source[1]


@rtml.task(retries=5)
def resume(paused: tuple[Checkpoint, str], steps: int) -> tuple[Checkpoint, str, str]:
    """Goes on where another process stopped: (checkpoint, node before, node now)."""
    checkpoint, node = train(paused[0], steps)
    return checkpoint, paused[1], node
