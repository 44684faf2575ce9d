"""Which gpus an executor sees: those that it was started for, and no others.

Libraries look for gpus once in the life of a process. So an executor is bound to its devices when it is forked
(`CUDA_VISIBLE_DEVICES`), and only tasks that ask for as many run there; all other executors see none. What asks for at
most one gpu gets a part of one device, which others may share; what asks for more gets whole ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import ceil

from rtml.graph.state import NodeState, Shape, WorkerState
from rtml.messages import ACTOR, ASYNC_ACTOR, EXECUTOR

_LITTLE = 1e-9


def gpus(shape: Shape) -> float:
    """What the shape asks for."""
    return shape.extra.get("gpu", 0.0) if shape.extra else 0.0


def suits(worker: WorkerState, shape: Shape) -> bool:
    """Whether the worker sees the devices that the shape asks for, and no more, and enough of them is free."""
    node = worker.node
    if not node.binds:
        return True
    wanted = gpus(shape)
    if not wanted or not worker.devices:
        return not wanted and not worker.devices
    if len(worker.devices) != ceil(wanted - _LITTLE):
        return False
    free = _free(node, worker)
    share = wanted / len(worker.devices)
    return all(free[device] >= share - _LITTLE for device in worker.devices if device < len(free))


def sees(worker: WorkerState, shape: Shape) -> bool:
    """Whether the worker sees as many devices as the shape asks for, free or not."""
    return not worker.node.binds or len(worker.devices) == ceil(gpus(shape) - _LITTLE)


def tightest(workers: Iterable[WorkerState]) -> WorkerState | None:
    """Of workers that suit, one whose devices have the least left, so that whole ones stay whole."""
    return min(
        workers, key=lambda worker: min(_free(worker.node, worker)[device] for device in worker.devices), default=None
    )


def choose(node: NodeState, shape: Shape) -> tuple[int, ...] | None:
    """The devices for a new process that is to run this; none for one that asks for no gpu. None: not now."""
    wanted = gpus(shape)
    if not node.binds or not wanted:
        return ()
    free = _free(node)
    if wanted <= 1 + _LITTLE:
        # The fullest one that has room, so that whole ones stay whole.
        fitting = [(share, device) for device, share in enumerate(free) if share >= wanted - _LITTLE]
        return (min(fitting)[1],) if fitting else None
    whole = [device for device, share in enumerate(free) if share >= 1 - _LITTLE]
    count = ceil(wanted - _LITTLE)
    return tuple(whole[:count]) if len(whole) >= count else None


def _free(node: NodeState, asking: WorkerState | None = None) -> list[float]:
    """The portion of each device that no worker holds; `asking` does not count what it was started for."""
    total = node.extra.get("gpu", 0.0)
    free = [min(1.0, total - device) for device in range(ceil(total - _LITTLE))]
    for worker in node.workers.values():
        if worker.devices:
            share = sum(map(gpus, _held(worker, worker is asking))) / len(worker.devices)
            for device in worker.devices:
                if device < len(free):
                    free[device] -= share
    return free


def _held(worker: WorkerState, asking: bool) -> Iterator[Shape]:
    """What the worker holds, or was started for and has not got yet."""
    if worker.role != EXECUTOR:
        yield from (task.profile.shape for task in worker.queue.values())
    elif worker.shape is not None:
        yield worker.shape
    yield from (shape for _, shape in worker.stack)
    yield from (shape for shape, _ in worker.leftover)
    coming = worker.session is None or worker.role in (ACTOR, ASYNC_ACTOR)
    if worker.meant is not None and coming and not (worker.queue or asking):
        yield worker.meant
