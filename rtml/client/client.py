"""One submitter: turns calls into tasks, results into values, and keeps alive what tasks in flight refer to.

The way of a call: `RemoteFunction.submit` -> `Client.call` (encode, a future, the core's buffer) -> the driver sends
the buffer when its flush rule says so -> `Client.receive` (the core's results settle futures) -> whoever waits is
told.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import itertools
import os
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

from rtml import codec, messages
from rtml.client import calls, handles, logs, references, results, streams
from rtml.client.actors import ActorRef
from rtml.client.collectives import Collectives
from rtml.client.context import current_client, current_task, free_in_children, is_executor, process, remove
from rtml.client.core import ClientCore
from rtml.client.driver import Driver, Resource, Waiter
from rtml.client.functions import RemoteFunction
from rtml.client.future import PENDING, Future, error_of, remaining
from rtml.client.gathered import Gathered
from rtml.client.references import Lease, Special
from rtml.client.waiting import Group
from rtml.errors import ConnectionLost, RtmlError
from rtml.messages import (
    CANCELLED,
    ERROR,
    OK,
    ErrorInfo,
    Function,
    Message,
    ObjectRef,
    Options,
    Results,
    Task,
    WatchResults,
    Welcome,
    session_of,
    task_id,
)
from rtml.store import Store

T = TypeVar("T")

#: Seconds that the dispatcher may take to answer a question.
_QUERY_TIMEOUT: Final = 10.0


class Client(Collectives, concurrent.futures.Executor):
    """A connection to an engine. Use `rtml.connect()` to get one; it is a `concurrent.futures.Executor` too.

    Args:
        core: the protocol's state, with this process's session.
        driver: moves the messages; started here by `open`.
        store: this process's hand on shared memory.
        show_logs: print what tasks print.
        resource: closed by `shutdown`.
    """

    def __init__(
        self,
        core: ClientCore,
        driver: Driver,
        store: Store,
        *,
        show_logs: bool = True,
        resource: Resource | None = None,
    ) -> None:
        self.core = core
        self.driver = driver
        self.lock = driver.lock
        free_in_children(driver.lock)
        self.store = store
        self.show_logs = show_logs
        self._resource = resource
        self._pid = os.getpid()
        self._forks = process.forks
        #: Futures captured by the definitions of functions, by function id: they live as long as this client.
        self._captured: dict[int, list[Future[Any]]] = {}
        #: No more calls: shut down, or the connection is lost for good (`_lost`).
        self._closed = False
        self._lost: BaseException | None = None
        #: Ids of tasks and queries, ascending, each used once.
        self._ids = itertools.count(task_id(core.session, 1))
        #: Unresolved futures by id. Strong: a task whose future was dropped still runs and is still accounted for.
        self._pending: dict[int, Future[Any]] = {}
        #: What unresolved tasks refer to: futures (dependencies, handles), and objects in our shared memory.
        self._kept: dict[int, list[Any]] = {}
        #: Futures of ours that travelled as handles, so that a returning handle is the same future again.
        self._escaped: weakref.WeakValueDictionary[int, Future[Any]] = weakref.WeakValueDictionary()
        #: Handles of foreign futures, by id.
        self._handles: weakref.WeakValueDictionary[int, Future[Any]] = weakref.WeakValueDictionary()
        #: Filled by finalisers, which may run anywhere: ("release" | "unwatch", id).
        self._dropped: deque[tuple[str, int]] = deque()
        #: Definitions by function object, as long as that lives.
        self._described: weakref.WeakKeyDictionary[Any, Function] = weakref.WeakKeyDictionary()
        #: Closures and lambdas that were submitted once.
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        #: What holds actors, by id.
        self._actors: weakref.WeakValueDictionary[int, ActorRef] = weakref.WeakValueDictionary()
        #: Open streams, by task.
        self._streams: dict[int, streams.Inlet] = {}
        #: Data endpoints of the nodes that the dispatcher knows.
        self.nodes: list[str] = []
        self._groups: list[Group] = []
        self._queries: dict[int, tuple[Waiter, list[str]]] = {}

    @property
    def closed(self) -> bool:
        """Whether `shutdown` was called, or the process was forked from the client's."""
        return (self._closed and self._lost is None) or self._forks != process.forks

    def open(self) -> Client:
        """Start the driver. Raises what the driver raises when it cannot connect."""
        self.driver.start(self)
        return self

    # --- submitting ---------------------------------------------------------------------------------------------------

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn(*args, **kwargs)` on a worker.

        Args:
            fn: a function, a `@rtml.task`, a bound method, a partial: anything callable that can be pickled.
            *args: values or futures; futures at any depth of lists, tuples and dicts become their values.
            **kwargs: likewise. Options are set by `rtml.task(...)` or `.options(...)`, never here.

        Raises:
            SubmitError: the function or the arguments cannot be sent.
            RuntimeError: the client was shut down, or belongs to the process that this one was forked from.
        """
        if isinstance(fn, RemoteFunction):
            return fn.submit_to(self, args, kwargs)
        plain, args, kwargs, options = calls.flatten(fn, args, kwargs)
        if calls.is_one_off(plain) and plain not in self._seen:
            # Programs make closures by the million and call each once: the first call carries its function along as
            # an argument, and only a function that comes again gets a definition, which lives as long as the client.
            self._seen.add(plain)
            plain, args, options = calls.call_object, (plain, *args), Options(name=plain.__qualname__)
        return self.call(self.describe(plain), args, kwargs, options)

    def call(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options | None,
        trace: str = "", context: int = 0, special: Special | None = None,
    ) -> Future[Any]:  # fmt: skip
        """Submit one call of a function that `describe` returned, see `Task`; `options` override the function's."""
        if self._closed or self._forks != process.forks:
            self._check_usable()
        encoded = codec.encode_call(args, kwargs, self.store, Future)
        if encoded.deps and any(isinstance(dep, Gathered) for dep in encoded.deps):
            encoded = codec.encode_call(calls.ungather(args), calls.ungather(kwargs), self.store, Future)
        parent = current_task()
        budget = options.deadline if options is not None and options.deadline is not None else function.options.deadline
        task = Task(
            0, function.id, encoded.payload, 0 if parent is None else parent.id,
            None, None, options, encoded.batch_key, encoded.items if function.rows else 1, trace, context,
        )  # fmt: skip
        failure = None
        with self.lock:
            number = task.id = next(self._ids)
            future: Future[Any] = Future(self, number)
            if encoded.deps or encoded.handles or encoded.payload.__class__ is not bytes:
                failure = references.link(self, task, encoded.deps, encoded.handles)
            if self._captured and function.id in self._captured:
                task.handles = [*(task.handles or ()), *(held.id for held in self._captured[function.id])]
            if failure is None:
                if special is not None:
                    special.prepare(self, task)
                self._pending[number] = future
                self.core.submit(task, None if budget is None else time.monotonic() + budget)
        if failure is not None:
            return self._failed(future, failure)
        self.driver.submitted()
        return future

    def describe(self, fn: Any, options: Options | None = None) -> Function:
        """The definition of a plain callable, known to the core from now on. Without options it is cached."""
        cacheable = options is None and calls.has_identity(fn)
        function = self._described.get(fn) if cacheable else None
        if function is None:
            captured: list[int] = []
            function = codec.describe_function(fn, options or Options(), self.store, Future, captured)
            if captured:
                with self.lock:
                    known = [handles.known(self, task) for task in captured]
                    self._captured[function.id] = [future for future in known if future is not None]
            if cacheable:
                self._described[fn] = function
        if not self.core.knows(function.id):
            with self.lock:
                self.core.define(function)
        return function

    def map(
        self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[T]:
        """Like the built-in `map`, on the workers: all calls are submitted now, results come in order.

        Args:
            fn: as for `submit`.
            *iterables: one per parameter of `fn`; ends with the shortest.
            timeout: seconds from now until which results may be waited for.
            chunksize: calls that form one task; raise it for long lists of short calls.

        Raises:
            TimeoutError: while iterating, when a result is not there in time.
            ValueError: chunksize is below one.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be at least 1")
        return calls.mapped(self, fn, iterables, timeout, chunksize)

    def put(self, value: T) -> Future[T]:
        """Store `value` once, for use in many tasks: returns a future that has ended already."""
        self._check_usable()
        encoded = codec.encode_value(value, self.store, Future, "the value")
        with self.lock:
            future: Future[T] = Future(self, next(self._ids))
            future._settle(encoded.payload, None, OK)
        held: list[Any] = list(encoded.handles)
        if isinstance(encoded.payload, ObjectRef):
            held.append(Lease(self, "free", encoded.payload.id))
        future._held = held or None
        return future

    # --- waiting ------------------------------------------------------------------------------------------------------

    def gather(self, *futures: Future[Any], return_exceptions: bool = False) -> Gathered:
        """One future of the list of all results, to be awaited or blocked on.

        Args:
            *futures: in the order wanted.
            return_exceptions: put errors into the list instead of ending with the first one.
        """
        gathered = Gathered(self, [as_future(future) for future in futures], return_exceptions)
        gathered.start()
        return gathered

    def cancel_all(self, futures: Iterable[Future[Any]]) -> list[Future[Any]]:
        """Cancel those of this client's futures that have not ended, and return them."""
        return results.cancel(self, futures)

    def sent(self, future: Future[Any]) -> bool:
        """Whether the future's task has been handed to the dispatcher."""
        return session_of(future.id) != self.core.session or self.core.sent(future.id)

    def register(self, group: Group) -> None:
        """Offer this client's futures to `group`, those that have ended and those that will."""
        with self.lock:
            self._groups.append(group)
            ended = [future for future in group.wanted if future._state is not PENDING and future._client is self]
        if ended:
            group.offer(ended)

    def unregister(self, group: Group) -> None:
        """The opposite of `register`."""
        with self.lock:
            if group in self._groups:
                self._groups.remove(group)

    def query(self, what: str, argument: str = "", timeout: float = _QUERY_TIMEOUT) -> str:
        """Ask the dispatcher (see `rtml.messages.Query`).

        Raises:
            TimeoutError: no answer within `timeout` seconds.
            ConnectionLost: the engine is gone, now or while waiting.
        """
        self._check_usable()
        waiter, body = Waiter(), []  # type: Waiter, list[str]
        with self.lock:
            number = next(self._ids)
            self._queries[number] = (waiter, body)
            self.core.query(number, what, argument)
        if not self.driver.wait(waiter, timeout):
            self._queries.pop(number, None)
            self.core.answered(number)
            raise TimeoutError(f"the dispatcher did not answer {what!r} within {timeout} s")
        if not body[0]:
            raise ConnectionLost(str(self._lost or "the client was closed"))
        return body[0]

    # --- the driver's side --------------------------------------------------------------------------------------------

    def receive(self, message: Message) -> bool:
        """Apply a message of the dispatcher; False if it is not for a submitter. Called by one thread at a time."""
        if message.__class__ is Results or isinstance(message, WatchResults):
            results.resolve(self, message)
            return True
        if isinstance(message, messages.Items):
            streams.receive(self, message)
            return True
        if isinstance(message, messages.Logs):
            if self.show_logs:
                logs.show(message.lines)
            return True
        if isinstance(message, messages.Reply):
            asked = self._queries.pop(message.id, None)
            if asked is not None:
                self.core.answered(message.id)
                asked[1].append(message.body)
                asked[0].notify(None)
            return True
        with self.lock:
            self.core.receive(message, time.monotonic())
            # A new dispatcher will not confirm what was cancelled before.
            welcome = isinstance(message, Welcome)
            forgotten = [self._kept.pop(task) for task in list(self._kept) if welcome and self.core.settled(task)]
        del forgotten
        if isinstance(message, Welcome):
            self.store.endpoints(message.data)
            self.nodes = message.data
        elif isinstance(message, messages.Moved):
            self.store.places.moved(message.objects)
        return False

    def collect(self) -> list[Message]:
        """What to send now, in this order. The caller sends it before it calls again."""
        now = time.monotonic()
        with self.lock:
            if self._dropped:
                self._drain_dropped()
            if self.core.returning:
                references.refresh(self.core, self._kept, self.store.places)
            return self.core.flush(now)

    def resume(self) -> list[Message]:
        """After a `Hello` on a new connection: everything that has to be said again."""
        now = time.monotonic()
        with self.lock:
            self._drain_dropped()
            references.refresh(self.core, self._kept, self.store.places)
            return self.core.resume(now)

    def fail_all(self, error: BaseException) -> None:
        """The connection is lost for good: all futures end with `error`."""
        results.fail_all(self, error)

    def drop(self, kind: str, number: int) -> None:
        """A lease is gone. Called by finalisers in any thread: takes no lock."""
        if self._forks == process.forks and not self._closed:
            if kind == "free":
                self.store.free(number)
            else:
                self._dropped.append((kind, number))
                self.driver.nudge()

    # --- values -------------------------------------------------------------------------------------------------------

    def decode(self, payload: bytes | ObjectRef, owner: Future[Any] | None = None) -> Any:
        """The value of a payload; the futures in it become handles."""
        return codec.decode_value(payload, self.store, self.handle)

    def decode_error(self, info: ErrorInfo) -> BaseException:
        """The exception that an `ErrorInfo` describes."""
        return codec.decode_error(info)

    def handle(self, task: int) -> Future[Any]:
        """The future of a task of anybody's, by its id."""
        with self.lock:
            return handles.handle(self, task)

    # --- the end ------------------------------------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls, and end. The client that was current before this one is so again.

        Inside a task it only waits for what that task has submitted: the client is the executor's, which goes on.

        Args:
            wait: first wait for everything that was submitted. Otherwise the connection stays until the program ends.
            cancel_futures: cancel what has not ended; with `wait` as well. Unlike with the standard library's
                executors, that is what runs, too.
        """
        if self._forks != process.forks:
            return
        if is_executor():
            if wait:
                self.wait_idle()
            return
        already, self._closed = self._closed, True
        remove(self)
        if cancel_futures:
            self.cancel_all(list(self._pending.values()))
        if wait:
            self.wait_idle()
        if wait or cancel_futures or not self._pending:
            self._close()
        elif not already:
            self.driver.expect()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Wait for everything that was submitted, as the standard executors do; after Ctrl-C, cancel it."""
        self.shutdown(wait=True, cancel_futures=kind is not None and issubclass(kind, KeyboardInterrupt))

    def close_at_exit(self) -> None:
        """Like the standard executors, finish what was submitted; but not after an error that ends the program."""
        crashed = getattr(sys, "last_type", None) is not None
        try:
            self.shutdown(wait=True, cancel_futures=crashed)
        except KeyboardInterrupt:
            self.shutdown(wait=True, cancel_futures=True)
            raise

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Block until nothing submitted here is unresolved; False if that takes longer than `timeout` seconds.

        Inside a task that is what the task itself has submitted.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while futures := self._unresolved():
            group = Group(futures, len(futures))
            self.register(group)
            try:
                if not self.driver.wait(group, remaining(deadline)):
                    return False
            finally:
                self.unregister(group)
        return True

    def _unresolved(self) -> set[Future[Any]]:
        current = current_task() if is_executor() else None
        with self.lock:
            found = self._pending.keys() - self.core.lasting - self._streams.keys()
            return {self._pending[task] for task in found if current is None or self.core.parent(task) == current.id}

    def __reduce__(self) -> Any:
        """In a task's closure or arguments it is the client of the process where it arrives."""
        return _arrived, ()

    def __repr__(self) -> str:
        return f"<Client session {self.core.session:#x}{' closed' if self._closed else ''}>"

    # --- inside -------------------------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._forks != process.forks:
            raise RuntimeError(
                f"this rtml client belongs to process {self._pid}, from which this one was forked; "
                "call rtml.connect() in the child to get its own, or use multiprocessing's 'spawn'"
            )
        if self._lost is not None:
            raise ConnectionLost(str(self._lost))
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def _failed(self, future: Future[Any], dependency: Future[Any]) -> Future[Any]:
        """The end of a call whose argument has no value: the argument's own."""
        error = dependency._error()
        with self.lock:
            future._settle(None, error, CANCELLED if dependency.cancelled() else ERROR)
        return future

    def _drain_dropped(self) -> None:
        while self._dropped:
            kind, number = self._dropped.popleft()
            if kind == "release":
                self.core.release([number])
            elif kind == "end":
                self.core.end(number)
            elif number not in self._handles:
                self.core.unwatch(number)

    def _close(self) -> None:
        atexit.unregister(self.close_at_exit)
        self.driver.close()
        if self._pending:
            self.fail_all(ConnectionLost("the client was closed"))
            self._lost = None
        self._groups.clear()
        self.store.close()
        resource, self._resource = self._resource, None
        if resource is not None:
            resource.close()


def _arrived() -> Client:
    """What a client is where it was sent to."""
    found = current_client()
    if found is None:
        raise RtmlError("an rtml client can only travel to the tasks of its engine, not through plain pickle")
    return found


def as_future(thing: Any) -> Future[Any]:
    """`thing` if it is a future of ours.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(thing, Future):
        return thing
    raise TypeError(f"expected an rtml future, got {type(thing).__name__}")


__all__ = ["Client", "as_future", "error_of"]
