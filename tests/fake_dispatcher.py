"""A dispatcher for client tests: a real link, and functions run inline in its one thread.

It keeps to what the protocol promises submitters: results in numbered batches, dependencies resolved, handles watched,
cancellation, acknowledgements recorded. Tasks of functions named "hold" stay unresolved until `open_gate()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rtml import codec
from rtml.client import context
from rtml.client.client import Client
from rtml.client.connecting import Connector
from rtml.client.core import ClientCore
from rtml.client.future import Future
from rtml.client.threads import ThreadDriver
from rtml.link import Hub
from rtml.messages import (
    CANCELLED,
    ERROR,
    OK,
    Ack,
    Cancel,
    Define,
    ErrorInfo,
    Farewell,
    Function,
    Hello,
    Holding,
    Message,
    Query,
    Rehello,
    Release,
    Reply,
    Results,
    Submit,
    Task,
    TaskResult,
    Unwatch,
    Watch,
    WatchResults,
    Welcome,
    decode,
    encode,
)
from rtml.store import Store


class FakeDispatcher:
    """Serves any number of clients at `address` until `close`."""

    def __init__(self, address: str, store: Store, epoch: int = 1) -> None:
        self.store = store
        self.epoch = epoch
        self.hub = Hub()
        self.address = self.hub.listen(address)
        self.functions: dict[int, Function] = {}
        self.tasks: dict[int, Task] = {}
        self.results: dict[int, TaskResult] = {}
        self.submitter: dict[int, int] = {}
        self.watchers: dict[int, list[int]] = {}
        #: Everything received, for assertions. Appended by the thread only.
        self.received: list[Message] = []
        self.frames = 0
        self.held: list[int] = []
        self._serial: dict[int, int] = {}
        self._peers: set[int] = set()
        self._gate = threading.Event()
        self._stop = threading.Event()
        self._jobs: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name="fake-dispatcher")
        self._thread.start()

    def close(self) -> None:
        """Stop and close all links."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self.hub.close()

    def open_gate(self) -> None:
        """Let the tasks named "hold" end."""
        self._gate.set()

    def close_gate(self) -> None:
        """Hold tasks named "hold" again."""
        self._gate.clear()

    def restart(self) -> None:
        """Forget everything, as a new incarnation with the same links (ZeroMQ looks like that)."""
        done = threading.Event()

        def job() -> None:
            self.epoch += 1
            for table in (self.functions, self.tasks, self.results, self.submitter, self.watchers, self._serial):
                table.clear()
            self.held.clear()
            done.set()

        self._jobs.append(job)
        done.wait()

    def drop_links(self) -> None:
        """Close the link of every peer."""
        done = threading.Event()

        def job() -> None:
            for peer in self._peers:
                self.hub.close_peer(peer)
            self._peers.clear()
            done.set()

        self._jobs.append(job)
        done.wait()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            while self._jobs:
                self._jobs.pop(0)()
            out: dict[int, list[Message]] = {}
            done: dict[int, list[TaskResult]] = {}
            for peer, frame in self.hub.poll(0.01):
                if frame is None:
                    continue
                self.frames += 1
                self._peers.add(peer)
                for message in decode(frame):
                    self.received.append(message)
                    self._handle(peer, message, out, done)
            if self._gate.is_set() and self.held:
                self._retry_held(done)
            for peer, results in done.items():
                self._serial[peer] = self._serial.get(peer, 0) + 1
                out.setdefault(peer, []).append(Results(self._serial[peer], results))
            for peer, messages in out.items():
                self.hub.send(peer, encode(messages))

    def _handle(
        self, peer: int, message: Message, out: dict[int, list[Message]], done: dict[int, list[TaskResult]]
    ) -> None:
        if isinstance(message, Hello):
            self._serial.setdefault(peer, 0)
            out.setdefault(peer, []).append(Welcome(self.epoch))
        elif peer not in self._serial:
            out[peer] = [Rehello(self.epoch)]
        elif isinstance(message, Define):
            self.functions.update({function.id: function for function in message.functions})
        elif isinstance(message, Submit):
            for task in message.tasks:
                self.submitter[task.id] = peer
                if task.id in self.results:
                    done.setdefault(peer, []).append(self.results[task.id])
                elif task.id not in self.tasks:
                    self.tasks[task.id] = task
                    self._finish(task.id, done)
        elif isinstance(message, Cancel):
            for number in message.tasks:
                if number not in self.results:
                    error = ErrorInfo("TaskCancelled", "cancelled")
                    self._end(TaskResult(number, 1, CANCELLED, error=error), done)
                    self._retry_held(done)
        elif isinstance(message, Watch):
            known = [self.results[number] for number in message.tasks if number in self.results]
            if known:
                out.setdefault(peer, []).append(WatchResults(known))
        elif isinstance(message, Query):
            out.setdefault(peer, []).append(Reply(message.id, f"{message.what} {message.argument}"))
        else:
            assert isinstance(message, Ack | Farewell | Unwatch | Release | Holding), message

    def _finish(self, number: int, done: dict[int, list[TaskResult]]) -> None:
        """Run a task whose dependencies have ended; try those again that waited for it."""
        task = self.tasks[number]
        if number in self.results:
            return
        function = self.functions[task.function]
        inputs: list[Any] = []
        for dep, payload in task.deps or ():
            if payload is None:
                result = self.results.get(dep)
                if result is None:
                    self.held.append(number)
                    return
                if result.outcome != OK:
                    self._end(TaskResult(number, 1, result.outcome, error=result.error), done)
                    return
                payload = result.payload
            inputs.append(codec.decode_value(payload, self.store))
        if function.name.rpartition(".")[2] == "hold" and not self._gate.is_set():
            self.held.append(number)
            return
        self._end(self._execute(task, function, inputs), done)
        self._retry_held(done)

    def _retry_held(self, done: dict[int, list[TaskResult]]) -> None:
        held, self.held = self.held, []
        for waiting in held:
            self._finish(waiting, done)

    def _execute(self, task: Task, function: Function, inputs: list[Any]) -> TaskResult:
        try:
            args, kwargs = codec.decode_call(task.args, inputs, self.store, lambda number: number)
            value = codec.load_function(function, self.store)(*args, **kwargs)
            if inspect.iscoroutine(value):
                value = asyncio.run(value)
            encoded = codec.encode_value(value, self.store, Future)
        except Exception as error:
            return TaskResult(task.id, 1, ERROR, error=codec.encode_error(error, [function.name]))
        return TaskResult(task.id, 1, OK, encoded.payload, handles=list(encoded.handles) or None)

    def _end(self, result: TaskResult, done: dict[int, list[TaskResult]]) -> None:
        self.results[result.id] = result
        done.setdefault(self.submitter[result.id], []).append(result)


@contextlib.contextmanager
def running(scheme: str = "unix") -> Iterator[tuple[FakeDispatcher, str]]:
    """A fake dispatcher and the directory of its shared memory, both gone afterwards."""
    directory = tempfile.mkdtemp()
    shm = tempfile.mkdtemp(prefix="rtml-test-", dir="/dev/shm")
    store = Store(shm, 5)
    try:
        fake = FakeDispatcher(f"{scheme}:{'//' if scheme == 'ipc' else ''}{directory}/s.sock", store)
        try:
            yield fake, shm
        finally:
            fake.open_gate()
            fake.close()
    finally:
        store.close()
        Store.remove(shm)
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def connected(scheme: str = "unix", reconnect_timeout: float = 10.0) -> Iterator[tuple[FakeDispatcher, Client]]:
    """A fake dispatcher and the current client, connected to it by a `ThreadDriver`."""
    with running(scheme) as (fake, shm):
        session = random.randrange(1 << 20, 1 << 30)
        driver = ThreadDriver(Connector(fake.address, reconnect_timeout=reconnect_timeout))
        client = Client(ClientCore(session), driver, Store(shm, session)).open()
        context.install(client)
        try:
            yield fake, client
        finally:
            fake.open_gate()
            client.shutdown(cancel_futures=True)
