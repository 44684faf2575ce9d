"""Signals to executors that must not wait for the end of their task to see a message."""

from __future__ import annotations

from typing import Final

from rtml.graph.pools import Pools
from rtml.graph.recovery import Recovery
from rtml.graph.state import State, WorkerState
from rtml.graph.tables import Tables
from rtml.messages import EXECUTOR, Interrupt

#: Seconds after which an executor that did not react to a signal gets another one; doubled each time up to the maximum.
INTERRUPT_AGAIN: Final = 0.02
INTERRUPT_AGAIN_MAX: Final = 1.0


class Interrupts:
    """Has executors signalled by their supervisors, until they react."""

    def __init__(self, tables: Tables, pools: Pools, recovery: Recovery) -> None:
        self.tables = tables
        self.pools = pools
        self.recovery = recovery

    def send(self, now: float) -> None:
        """Have executors signalled that must not wait for the end of their task to see a message."""
        tables = self.tables
        for worker in tables.interrupts.values():
            self._signal(worker)
            if not worker.repeating:
                worker.repeating = True
                tables.at(now + INTERRUPT_AGAIN, self._repeat, (worker, INTERRUPT_AGAIN, now))
        tables.interrupts.clear()

    def _signal(self, worker: WorkerState) -> None:
        supervisor = worker.node.supervisor
        if supervisor is not None and worker.session is not None and not worker.dying:
            self.tables.tell(supervisor, Interrupt(worker.id))

    def _repeat(self, repetition: tuple[WorkerState, float, float], now: float) -> None:
        """A signal may overtake the message it is about, and be taken while it cannot be acted upon: send it again.

        What does not react for long (native code, code that swallows interrupts) ends with its process.
        """
        worker, delay, since = repetition
        unwanted = self.recovery.has_revoked(worker) or any(task.state is State.DONE for task in worker.queue.values())
        worker.repeating = (unwanted or worker.recalling) and worker.id in self.tables.workers
        if not worker.repeating:
            return
        if unwanted and worker.role == EXECUTOR and now - since > self.tables.limits.cancel_grace:
            self.pools.kill(worker, "does not react to a cancellation")
        else:
            self._signal(worker)
        delay = min(2 * delay, INTERRUPT_AGAIN_MAX)
        self.tables.at(now + delay, self._repeat, (worker, delay, since))
