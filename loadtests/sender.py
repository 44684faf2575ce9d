"""One generator: sends a plan's requests at their times whatever became of those before, or keeps n under way."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from loadtests.schedule import Floats, Plan
from loadtests.wire import BROKEN, TIMEOUT, Connection, Timer

#: Seconds between looks for requests that are given up.
_SWEEP: Final = 0.05
#: Seconds between two words on how it goes.
_SAY: Final = 0.2
_UNTOLD: Final = (float("nan"),) * 3
#: Seconds for opening a connection.
_CONNECT_TIMEOUT: Final = 5.0


class Message(NamedTuple):
    """A request as bytes, but for its budget, which is written when it is sent."""

    head: bytes
    body: bytes


@dataclass
class Target:
    """Where requests go, and what they are.

    Attributes:
        messages: For each kind its variants, used in turn.
        deadline_header: Header that tells the server what is left of the budget in milliseconds; None: it is not told.
        connections: Most of one generator; requests beyond wait for one (and it counts in their time).
        timeout: Seconds after which a request is given up.
        timed: Keep what the server says of its time.
    """

    host: str
    port: int
    messages: list[list[Message]]
    deadline_header: str | None = "x-rtml-deadline-ms"
    connections: int = 1024
    timeout: float = 10.0
    timed: bool = False


@dataclass
class Sent:
    """What became of the requests; arrays of one length, seconds on the plan's clock.

    Attributes:
        sent: When it was handed to the kernel; nan: never.
        done: When its answer had come, or it was given up.
        status: Of HTTP, or BROKEN, or TIMEOUT.
        cpu: Part of a core that the generator used.
        waited: Requests that had to wait for a connection.
        spent: A row for each request, if the target is timed: seconds of the whole in the server, waiting for an
            executor, running; nan where it did not say.
    """

    sent: Floats
    done: Floats
    status: npt.NDArray[np.int16]
    cpu: float = 0.0
    waited: int = 0
    spent: Floats | None = None


@dataclass
class _Pool:
    """Connections, the last used first."""

    target: Target
    answered: Callable[[Connection, int, int], None]
    ready: Callable[[], None]
    free: list[Connection] = field(default_factory=list)
    all: set[Connection] = field(default_factory=set)
    opening: set[asyncio.Task[None]] = field(default_factory=set)
    failed: int = 0

    def open(self) -> None:
        """Opens one more, if that is allowed."""
        if len(self.all) + len(self.opening) < self.target.connections:
            task = asyncio.get_running_loop().create_task(self._open())
            self.opening.add(task)
            task.add_done_callback(self.opening.discard)

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                transport, connection = await loop.create_connection(
                    lambda: Connection(self.answered, self.all.discard, self.target.timed),
                    self.target.host,
                    self.target.port,
                )
        except (OSError, TimeoutError):
            self.failed += 1
            return
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.all.add(connection)
        self.free.append(connection)
        self.ready()

    def take(self) -> Connection | None:
        """A usable one, or None."""
        while self.free:
            connection = self.free.pop()
            if connection.usable:
                return connection
        return None

    async def close(self) -> None:
        for task in list(self.opening):
            task.cancel()
        for connection in list(self.all):
            connection.abort()
        await asyncio.sleep(0)


class Sender:
    """Sends one plan.

    Args:
        target: Where to.
        plan: What and when.
        progress: Told how many were sent and how many have ended, some times a second.
    """

    def __init__(self, target: Target, plan: Plan, progress: Callable[[int, int], None] | None = None) -> None:
        self._target = target
        self._plan = plan
        self._times = plan.times.tolist()
        self._kinds = plan.kinds.tolist()
        self._deadlines = plan.deadlines.tolist()
        self._progress = progress
        count = len(plan.times)
        self._sent = [float("nan")] * count
        self._done = [float("nan")] * count
        self._status = [TIMEOUT] * count
        self._spent = [_UNTOLD] * count if target.timed else []
        self._pool = _Pool(target, self._answered, self._send_waiting)
        #: Planned, due, and without a connection.
        self._waiting: deque[int] = deque()
        #: In the order in which they were sent, with the connection they are on.
        self._under_way: deque[tuple[int, Connection]] = deque()
        self._next = self._ended = self._waited = 0
        self._start = self._said = 0.0
        self._finished = asyncio.Event()
        self._header = b"" if target.deadline_header is None else target.deadline_header.encode() + b": "

    async def prepare(self, connections: int = 16) -> None:
        """Opens the first connections.

        Raises:
            ConnectionError: nothing listens there.
        """
        for _ in range(min(connections, self._target.connections)):
            self._pool.open()
        await asyncio.gather(*self._pool.opening)
        if not self._pool.all:
            raise ConnectionError(f"nothing answers at {self._target.host}:{self._target.port}")

    async def run(self, start: float) -> Sent:
        """Sends all of it; `start` is the plan's 0 on the monotonic clock."""
        loop = asyncio.get_running_loop()
        self._start = start
        self._timer = Timer(loop, self._due)
        cpu, began = time.process_time(), time.monotonic()
        gc.collect()
        gc.disable()
        try:
            if self._times:
                self._timer.at(start + self._times[0])
                while not self._finished.is_set():
                    try:
                        await asyncio.wait_for(self._finished.wait(), _SWEEP)
                    except TimeoutError:
                        self._sweep()
        finally:
            gc.enable()
            self._timer.close()
            await self._pool.close()
        used = (time.process_time() - cpu) / max(1e-9, time.monotonic() - max(began, start))
        spent = np.array(self._spent).reshape(-1, 3) if self._target.timed else None
        status = np.array(self._status, np.int16)
        return Sent(np.array(self._sent), np.array(self._done), status, used, self._waited, spent)

    def _due(self) -> None:
        """Sends what is to be sent by now."""
        times, count = self._times, len(self._times)
        while self._next < count and times[self._next] <= time.monotonic() - self._start:
            number = self._next
            self._next += 1
            connection = None if self._waiting else self._pool.take()
            if connection is None:
                self._waiting.append(number)
                self._waited += 1
                self._pool.open()
            else:
                self._send(number, connection)
        if self._next < count:
            self._timer.at(self._start + times[self._next])

    def _send_waiting(self) -> None:
        while self._waiting:
            connection = self._pool.take()
            if connection is None:
                return
            self._send(self._waiting.popleft(), connection)

    def _send(self, number: int, connection: Connection) -> None:
        variants = self._target.messages[self._kinds[number]]
        message = variants[number % len(variants)]
        now = time.monotonic() - self._start
        self._sent[number] = now
        deadline = self._deadlines[number]
        if self._header and deadline != float("inf"):
            # What is left, as a caller would say it: time lost here is lost.
            left = max(0.1, (self._times[number] + deadline - now) * 1e3)
            data = b"%b%b%.3f\r\n\r\n%b" % (message.head, self._header, left, message.body)
        else:
            data = b"%b\r\n%b" % (message.head, message.body)
        self._under_way.append((number, connection))
        connection.send(number, data)

    def _answered(self, connection: Connection, number: int, status: int) -> None:
        self._done[number] = time.monotonic() - self._start
        self._status[number] = status
        if self._spent and connection.timing is not None:
            self._spent[number] = connection.timing
        self._ended += 1
        if connection.usable:
            self._pool.free.append(connection)
        if self._waiting:
            self._send_waiting()
        if self._ended == len(self._times):
            self._finished.set()

    def _sweep(self) -> None:
        """Gives up what has waited too long, and says how it goes."""
        now = time.monotonic() - self._start
        limit = now - self._target.timeout
        while self._under_way:
            number, connection = self._under_way[0]
            if connection.request == number and self._sent[number] > limit:
                break
            self._under_way.popleft()
            if connection.request == number:
                connection.request = -1
                connection.abort()
                self._answered(connection, number, TIMEOUT)
        while self._waiting and self._times[self._waiting[0]] < limit:
            number = self._waiting.popleft()
            self._done[number], self._status[number] = now, BROKEN if not self._pool.all else TIMEOUT
            self._ended += 1
        if self._waiting:
            self._pool.open()
        if self._ended == len(self._times):
            self._finished.set()
        if self._progress is not None and now > self._said + _SAY:
            self._said = now
            self._progress(self._next, self._ended)


async def closed(target: Target, concurrency: int, seconds: float) -> Sent:
    """Keeps `concurrency` requests under way for so long; times are from when each was sent.

    Raises:
        ConnectionError: nothing listens there.
    """
    sent: list[float] = []
    done: list[float] = []
    status: list[int] = []
    variants = target.messages[0]
    start = end = 0.0
    running = 0
    finished = asyncio.Event()

    def send(connection: Connection) -> None:
        nonlocal running
        number = len(sent)
        message = variants[number % len(variants)]
        sent.append(time.monotonic() - start)
        done.append(float("nan"))
        status.append(TIMEOUT)
        running += 1
        connection.send(number, b"%b\r\n%b" % (message.head, message.body))

    def answered(connection: Connection, number: int, code: int) -> None:
        nonlocal running
        done[number] = time.monotonic() - start
        status[number] = code
        running -= 1
        if done[number] < end and connection.usable:
            send(connection)
        elif not running:
            finished.set()

    pool = _Pool(target, answered, lambda: None)
    for _ in range(concurrency):
        pool.open()
    await asyncio.gather(*pool.opening)
    if len(pool.all) < concurrency:
        await pool.close()
        raise ConnectionError(f"{target.host}:{target.port} took {len(pool.all)} of {concurrency} connections")
    cpu, start, end = time.process_time(), time.monotonic(), seconds
    for connection in list(pool.all):
        send(connection)
    try:
        async with asyncio.timeout(seconds + target.timeout):
            await finished.wait()
    except TimeoutError:
        pass
    used = (time.process_time() - cpu) / (time.monotonic() - start)
    await pool.close()
    return Sent(np.array(sent), np.array(done), np.array(status, np.int16), used)
