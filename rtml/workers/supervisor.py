"""The parent of a node's processes: fork server, watcher, and the one who ends and cleans up.

    python -m rtml.workers.supervisor --session-dir D --shm-dir S --workers N [...]

It starts the dispatcher by exec, imports what executors share, freezes the garbage collector and forks executors from
there. It stays single-threaded, without zmq, event loops or models, because a fork copies only the forking thread. All
it does between events is sleep in one `poll`.

Who notices what:

* an executor died: its pidfd; reported as `ExecutorDied` with the tasks it was inside of (from the running page);
* the dispatcher died: its pidfd; a new one is started, everybody reconnects by path and says what they hold (D9);
* the driver died: its pidfd; everything is ended at once, nobody wants the results;
* the supervisor died: PR_SET_PDEATHSIG ends executors and dispatcher, the janitor the rest (`rtml.workers.janitor`).

The dispatcher decides how many executors there are; only the first ones are started unasked.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Final

from rtml.exchange import Place
from rtml.link import Link, LinkClosed, connect
from rtml.link.unix import UnixLink
from rtml.messages import (
    ACTOR,
    ASYNC_ACTOR,
    ASYNC_EXECUTOR,
    EXECUTOR,
    SUPERVISOR,
    ExecutorDied,
    ExecutorStarted,
    Hello,
    Interrupt,
    KillExecutor,
    Message,
    Node,
    Refused,
    Rehello,
    StartExecutor,
    Welcome,
    decode,
    encode,
)
from rtml.workers import janitor
from rtml.workers.data import DataEndpoint
from rtml.workers.page import DATA_SLOT, PID, SLOTS_MAX, RunningPage
from rtml.workers.processes import Child, die_with_parent, fork, killed, prefer_for_oom, reason_of, show_devices
from rtml.workers.settings import Settings, parse

#: Threads of numerical libraries per executor: several executors must not fight for the same cores.
_ONE_THREAD: Final = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    # Not a number of threads, but one that it would start: onnxruntime reports its use home unless told not to.
    "ORT_DISABLE_TELEMETRY",
)
#: Executors share these imports; together about 100 ms and 20 MiB that are paid once.
_PREIMPORTS: Final = ("numpy", "rtml.workers.actors", "cloudpickle")
_NICE: Final = {EXECUTOR: 19, ASYNC_EXECUTOR: 5, ACTOR: 19, ASYNC_ACTOR: 19}
_SHORT: Final = {EXECUTOR: "exec", ASYNC_EXECUTOR: "async", ACTOR: "actor", ASYNC_ACTOR: "actor"}
#: A dispatcher that dies within this many seconds of its start did not come up.
_DISPATCHER_UP_S: Final = 2.0
_DISPATCHER_FAILURES_MAX: Final = 5
_RECONNECT_S: Final = 0.02
#: Seconds for which a node that leaves gives its objects to others, though its tasks took all the time there was.
_HAND_OVER_S: Final = 2.0
#: Seconds after which executors are told again to leave; doubled each time.
_SIGNAL_AGAIN_S: Final = 0.05


class Supervisor:
    """Runs one node until its driver is gone or it is told to stop.

    Args:
        settings: the command line.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._page = RunningPage()
        self._poll = select.poll()
        self._children: dict[int, Child] = {}  # by pidfd
        self._slots = list(range(SLOTS_MAX - 1, DATA_SLOT, -1))  # slot 0 is the dispatcher's
        self._link: Link | None = None
        self._link_fd = -1
        self._dispatcher = -1  # pidfd; -1 while there is none
        self._dispatcher_pid = 0
        self._dispatcher_started = 0.0
        self._dispatcher_failures = 0
        self._driver = -1
        self._janitor = 0
        self._janitor_fd = -1
        self._data: DataEndpoint | None = None
        self._wake_read = self._wake_write = -1
        #: Executors that end now do so because they were told to.
        self._ending = False
        #: Signals to stop that came: the first drains, the second kills.
        self._stops = 0
        self._session = int.from_bytes(os.urandom(4), "big") >> 1
        #: Told to the next dispatcher, so that it knows us as the one it (or its predecessor) spoke to.
        self._epoch = 0

    # --- life -------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Starts everything, serves until the end, cleans up. Returns the exit code."""
        code = 1
        try:
            try:
                self._prepare()
            except (OSError, ValueError) as error:
                _say(f"cannot start: {error}")  # no room for a file or a process, say
                return code
            self._start_dispatcher()
            self._start_data()
            self._import_shared()
            for worker in range(1, self.settings.workers + 1):
                self._fork_executor(worker, EXECUTOR)
            if self.settings.async_executors:
                # Only now: asyncio takes as long as everything before, and sync executors do without.
                gc.disable()
                importlib.import_module("rtml.workers.async_executor")
                _freeze()
            for worker in range(self.settings.async_executors):
                self._fork_executor(self.settings.workers + 1 + worker, ASYNC_EXECUTOR)
            code = self._serve()
        finally:
            self._end(drain=self.settings.drain if code == 0 and self._stops == 1 else 0.0)
        return code

    def _prepare(self) -> None:
        # A process group of our own, so that Ctrl-C in the driver's terminal is the driver's alone. Not a session of
        # our own: with autogroups the kernel compares nice values only within a session (D13 needs them compared).
        with contextlib.suppress(PermissionError):
            os.setpgid(0, 0)
        for directory in self.settings.directories:
            janitor.own(directory)
        os.makedirs(self.settings.spill_dir, mode=0o700, exist_ok=True)
        if self.settings.data:
            self._data = DataEndpoint(self.settings)
        self._place().write(self.settings.shm_dir)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        os.set_blocking(self._wake_read, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_stop)
        # Inherited by executors until they have a handler: an early `Interrupt` must not end them.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self._start_janitor()
        self._poll.register(self._wake_read, select.POLLIN)
        if self.settings.driver_pid:
            try:
                self._driver = os.pidfd_open(self.settings.driver_pid)
            except ProcessLookupError:
                raise SystemExit("rtml: the driver process is gone already") from None
            self._poll.register(self._driver, select.POLLIN)

    def _place(self) -> Place:
        if self._data is not None:
            return self._data.place(self.settings)
        settings = self.settings
        return Place(memory=settings.object_memory, spill=settings.spill_dir, spill_max=settings.spill_max)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1

    def _import_shared(self) -> None:
        for path in reversed(self.settings.path):
            if path not in sys.path:
                sys.path.insert(0, path)
        gc.disable()  # until `_freeze`
        for module in _PREIMPORTS:
            importlib.import_module(module)
        for module in self.settings.preimport:
            try:
                importlib.import_module(module)
            except Exception as error:  # noqa: BLE001 - user code; executors meet the same error where it can be reported
                _say(f"cannot pre-import {module}: {type(error).__name__}: {error}")
        _freeze()

    def _serve(self) -> int:
        while True:
            if self._stops:
                return 0
            if self._link is None and self._dispatcher >= 0:
                self._try_connect()
            timeout = None if self._link is not None else _RECONNECT_S * 1000
            for fd, _ in self._poll.poll(timeout):
                if fd == self._wake_read:
                    self._read_wake()
                elif fd == self._driver:
                    return 0
                elif fd == self._dispatcher:
                    if not self._dispatcher_died():
                        return 1
                elif fd == self._janitor_fd:
                    self._reap_janitor()
                    self._start_janitor()
                elif self._data is not None and fd == self._data.pidfd:
                    self._data_died(self._data)
                elif fd in self._children:
                    self._child_died(self._children[fd])
                elif fd == self._link_fd:
                    self._receive()

    # --- data endpoint ----------------------------------------------------------------------------------------------

    def _start_data(self) -> None:
        if self._data is not None:
            self._data.start(self._fork)
            self._page.slot(DATA_SLOT)[PID] = self._data.pid
            self._poll.register(self._data.pidfd, select.POLLIN)

    def _data_died(self, data: DataEndpoint) -> None:
        self._poll.unregister(data.pidfd)
        self._page.slot(DATA_SLOT)[PID] = 0
        if data.died():
            self._start_data()
        else:
            _say("the data endpoint dies at its start: large objects cannot leave this node any more")

    # --- dispatcher -------------------------------------------------------------------------------------------------

    def _start_dispatcher(self) -> None:
        arguments = [sys.executable, "-P", "-m", "rtml.dispatcher", "--shm-dir", self.settings.shm_dir]
        for address in self.settings.listen_addresses:
            arguments += ["--listen", address]
        if self._data is not None:
            arguments += ["--data", self._data.address, "--data-socket", self._data.path]
        arguments += self.settings.dispatcher_args
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))

        def run() -> int:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
            os.execve(sys.executable, arguments, environment)

        self._dispatcher_started = time.monotonic()
        self._dispatcher_pid = self._fork(run, "rtml-dispatcher")
        self._page.slot(0)[PID] = self._dispatcher_pid
        self._dispatcher = os.pidfd_open(self._dispatcher_pid)
        self._poll.register(self._dispatcher, select.POLLIN)

    def _dispatcher_died(self) -> bool:
        """Starts another one. Returns False if that is hopeless."""
        self._poll.unregister(self._dispatcher)
        os.close(self._dispatcher)
        self._dispatcher = -1
        _, status = os.waitpid(self._dispatcher_pid, 0)
        self._page.slot(0)[PID] = 0
        self._lose_link()
        up = time.monotonic() - self._dispatcher_started > _DISPATCHER_UP_S
        self._dispatcher_failures = 0 if up or killed(status) else self._dispatcher_failures + 1
        _say(f"the dispatcher died ({reason_of(status)})")
        if self._dispatcher_failures >= _DISPATCHER_FAILURES_MAX:
            _say(f"giving up: the dispatcher died {self._dispatcher_failures} times at its start")
            return False
        self._start_dispatcher()
        return True

    def _try_connect(self) -> None:
        try:
            self._link = connect(self.settings.unix_address, timeout=0.0)
        except LinkClosed:
            return
        self._link_fd = self._link.fileno()
        self._poll.register(self._link_fd, select.POLLIN)
        again = self._epoch != 0
        self._send(self._introduction())
        if again:
            # Executors in the middle of a task are to notice that their link broke, and to say what they hold.
            for child in self._children.values():
                child.send_signal(signal.SIGUSR1)

    def _introduction(self) -> list[Message]:
        hello = Hello(
            role=SUPERVISOR,
            session=self._session,
            pid=os.getpid(),
            name=self.settings.name,
            python=".".join(map(str, sys.version_info[:3])),
            epoch=self._epoch,
        )
        executors = [(child.worker, child.role, child.pid) for child in self._children.values()]
        settings = self.settings
        node = Node(
            name=settings.name,
            cpu=float(settings.workers) if settings.cpu is None else settings.cpu,
            gpu=settings.gpu,
            memory=settings.memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            resources=settings.resources | ({} if self._data is None else self._data.label),
            executors=executors,
            blocked_max=settings.blocked_max,
            leaving=self._ending,
            workers=settings.workers,
            binds=settings.gpu > 0,
        )
        return [hello, node]

    def _lose_link(self) -> None:
        if self._link is not None:
            self._poll.unregister(self._link_fd)
            self._link.close()
            self._link, self._link_fd = None, -1

    def _send(self, messages: list[Message]) -> None:
        """To the dispatcher. If there is none, the next introduction says the same by listing who is alive."""
        if self._link is not None:
            try:
                self._link.send(encode(messages))
            except LinkClosed:
                self._lose_link()

    def _receive(self) -> None:
        assert self._link is not None
        try:
            frames = self._link.recv(0)
        except LinkClosed:
            self._lose_link()
            return
        for frame in frames:
            for message in decode(frame):
                self._handle(message)

    def _handle(self, message: Message) -> None:
        match message:
            case StartExecutor():
                self._fork_executor(message.worker, message.role, message.devices)
            case KillExecutor():
                for child in self._find(message.worker):
                    child.killed = message.reason
                    janitor.kill_group(child.pid)
            case Interrupt():
                for child in self._find(message.worker):
                    child.send_signal(signal.SIGUSR1)
            case Welcome():
                self._epoch = message.epoch
            case Rehello():
                self._epoch = message.epoch
                self._send(self._introduction())
            case Refused():
                _say(f"the dispatcher refuses this node: {message.reason}")
                self._stops = 2
            case _:
                pass  # nothing else is for a supervisor

    def _find(self, worker: int) -> list[Child]:
        return [child for child in self._children.values() if child.worker == worker]

    # --- children ---------------------------------------------------------------------------------------------------

    def _fork(self, body: Callable[[], int], name: str) -> int:
        """Forks a process that dies with us and runs `body` to its exit code. Returns its pid."""
        return fork(body, name, self._close_in_child)

    def _close_in_child(self) -> None:
        """A child keeps nothing of ours open."""
        for fd in (self._wake_read, self._wake_write, self._dispatcher, self._driver, self._janitor_fd):
            if fd >= 0:
                os.close(fd)
        for child in self._children.values():
            os.close(child.pidfd)
        if self._data is not None:
            self._data.close_in_child()
        if isinstance(self._link, UnixLink):
            self._link.close_in_child()  # the parent goes on with it

    def _fork_executor(self, worker: int, role: str, devices: Sequence[int] = ()) -> None:
        if not self._slots:
            self._send([ExecutorDied(worker=worker, reason=f"not started: {SLOTS_MAX - 1} processes run")])
            return
        slot = self._slots.pop()
        self._page.clear(slot)

        def run() -> int:
            prefer_for_oom()
            if self.settings.gpu:
                show_devices(devices)
            return self._run_executor(worker, role, slot, devices)

        try:
            pid = self._fork(run, f"rtml-{_SHORT.get(role, role)}-{worker}")
        except OSError as error:  # the machine has no room for another process
            self._slots.append(slot)
            self._send([ExecutorDied(worker=worker, reason=f"not started: {error}")])
            return
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)  # also here, so that the group exists before we could want to kill it
        self._page.slot(slot)[PID] = pid
        child = Child(worker=worker, role=role, pid=pid, pidfd=os.pidfd_open(pid), slot=slot)
        self._children[child.pidfd] = child
        self._poll.register(child.pidfd, select.POLLIN)
        self._send([ExecutorStarted(worker=worker, role=role, pid=pid)])

    def _run_executor(self, worker: int, role: str, slot: int, devices: Sequence[int]) -> int:
        from rtml.workers.setup import ExecutorSettings

        settings = ExecutorSettings(
            worker=worker,
            address=self.settings.executor_address,
            shm_dir=self.settings.shm_dir,
            page=self._page.slot(slot),
            logs=self.settings.logs,
            nice=_NICE.get(role, 0),
            devices=list(devices),
        )
        if role == ACTOR:
            from rtml.workers.actors import run_actor

            return run_actor(settings)
        if role == ASYNC_ACTOR:
            from rtml.workers.async_actors import run_async_actor

            return run_async_actor(settings)
        if role == ASYNC_EXECUTOR:
            from rtml.workers.async_executor import run_async_executor

            return run_async_executor(settings)
        from rtml.workers.executor import run_executor

        return run_executor(settings)

    def _child_died(self, child: Child) -> None:
        self._poll.unregister(child.pidfd)
        os.close(child.pidfd)
        del self._children[child.pidfd]
        _, status = os.waitpid(child.pid, 0)
        janitor.kill_group(child.pid)  # whatever user code forked there
        running = self._page.running(child.slot)
        left = self._ending or self._page.left(child.slot)
        self._page.clear(child.slot)
        self._slots.append(child.slot)
        reason = f"killed: {child.killed}" if child.killed else "left" if left else reason_of(status)
        self._send([ExecutorDied(worker=child.worker, reason=reason, running=running)])

    # --- janitor ----------------------------------------------------------------------------------------------------

    def _start_janitor(self) -> None:
        us = os.pidfd_open(os.getpid())
        directories = self.settings.directories

        def run() -> int:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            die_with_parent(False)
            janitor.run_janitor(us, self._page, directories)
            return 0

        self._janitor = self._fork(run, "rtml-janitor")
        os.close(us)
        self._janitor_fd = os.pidfd_open(self._janitor)
        self._poll.register(self._janitor_fd, select.POLLIN)

    def _reap_janitor(self) -> None:
        self._poll.unregister(self._janitor_fd)
        os.close(self._janitor_fd)
        self._janitor_fd = -1
        os.waitpid(self._janitor, 0)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _end(self, drain: float) -> None:
        """Ends all processes and removes the directories: gently within `drain` seconds, then by force."""
        self._ending = True
        if drain > 0:
            # Before the executors end: what they have not begun may still go to other nodes.
            self._send(self._introduction()[1:])
            for child in self._children.values():
                child.send_signal(signal.SIGTERM)
            until = time.monotonic() + drain
            self._await_children(until)
            self._hand_over(max(until, time.monotonic() + _HAND_OVER_S))
        for child in list(self._children.values()):
            janitor.kill_group(child.pid)
        self._await_children(None)
        if self._dispatcher >= 0:
            self._lose_link()
            self._end_dispatcher(1.0 if drain > 0 else 0.0)
        if self._data is not None and self._data.pidfd >= 0:
            janitor.kill_group(self._data.pid)
            self._data.died()
        for directory in self.settings.directories:
            janitor.remove(directory)
        if self._janitor_fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._janitor, signal.SIGKILL)
            self._reap_janitor()

    def _hand_over(self, until: float) -> None:
        """Other nodes take the objects that are still needed, within this time or until a second signal to stop."""
        self._read_wake()
        if self._data is None or self._data.pidfd < 0 or self._link is None or self._stops > 1:
            return
        try:
            problem = self._data.hand_over(self._link, until, self._wake_read)
        except LinkClosed:
            self._lose_link()
            problem = "the dispatcher has died: what lies here is lost with this node"
        if problem:
            _say(problem)

    def _await_children(self, until: float | None) -> None:
        """Waits until no executor is left, or `until` on the monotonic clock, or a second signal to stop.

        With `until` they are told again to leave, more and more rarely: one that was just about to wait for messages
        when the signal came would notice it only with the next message.
        """
        if not self._children:
            return
        waiting = select.poll()
        waiting.register(self._wake_read, select.POLLIN)
        for fd in self._children:
            waiting.register(fd, select.POLLIN)
        pause = _SIGNAL_AGAIN_S
        while self._children:
            left = None if until is None else max(0.0, min(until - time.monotonic(), pause)) * 1000
            ended = waiting.poll(left)
            if not ended:
                pause *= 2
                for child in self._children.values():
                    child.send_signal(signal.SIGTERM)
            for fd, _ in ended:
                if fd == self._wake_read:
                    self._read_wake()
                else:
                    waiting.unregister(fd)
                    self._child_died(self._children[fd])
            if until is not None and (self._stops > 1 or time.monotonic() >= until):
                return

    def _read_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)

    def _end_dispatcher(self, patience: float) -> None:
        if patience > 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._dispatcher, signal.SIGTERM)
            waiting = select.poll()
            waiting.register(self._dispatcher, select.POLLIN)
            waiting.poll(patience * 1000)
        janitor.kill_group(self._dispatcher_pid)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._dispatcher_pid, 0)


def _freeze() -> None:
    """What is shared with the children stays shared: no collection ever touches (and so copies) these pages.

    Imports make no garbage worth a collection, so there is none (15 ms of the start).
    """
    gc.freeze()
    gc.enable()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"rtml supervisor: {text}\n".encode())


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the process."""
    settings = parse(sys.argv[1:] if arguments is None else arguments, __doc__ or "")
    for variable in _ONE_THREAD:
        os.environ.setdefault(variable, "1")
    return Supervisor(settings).run()


if __name__ == "__main__":
    sys.exit(main())
