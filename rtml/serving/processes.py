"""A gateway of several processes on one port: the supervisor, which serves nothing itself.

It starts the processes, each of which listens on the port (SO_REUSEPORT: the kernel spreads connections over those that
live), starts another when one dies, adds up what they count, hands commands from one of them to all, and passes on
SIGTERM (drain) and SIGHUP (read files again). An engine that is not running elsewhere is started here, so that it
outlives any of the processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from rtml.link import AddressError
from rtml.serving.member import Answer, Ask, Command, Counted, Message, Pipe, Serving, Start, Whole
from rtml.serving.pages import Account, Ledger, make_page
from rtml.serving.quotas import Table, make_memory

_logger = logging.getLogger("rtml.serving")

#: Seconds before a process that died is started again: at first, at most; and how long one lives that begins anew.
_PAUSE: Final = 0.1
_PAUSE_MAX: Final = 10.0
_SETTLED: Final = 30.0
#: Seconds that a process gets to end beyond those that its requests get.
_GOODBYE: Final = 5.0


class Child:
    """One process, as the supervisor sees it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pipe: Pipe
        self.process: subprocess.Popen[bytes]
        self.account: Account
        self.started = asyncio.get_running_loop().time()
        self.serving = False
        #: Commands that it has not answered.
        self.owes: dict[int, asyncio.Future[Answer]] = {}


class Supervisor:
    """Keeps a gateway's processes running.

    Args:
        start: What each of them is told to serve.
        wanted: How many there should be.
    """

    def __init__(self, start: Start, wanted: int) -> None:
        self._start = start
        self._wanted = wanted
        self._children: dict[int, Child] = {}
        self._ledger = Ledger()
        self._deaths: dict[str, int] = {}
        self._quotas = make_memory() if start.http.tokens else -1
        self._table = Table(self._quotas, 0) if self._quotas >= 0 else None
        #: The last command about each key, for processes that start later.
        self._commands: dict[str, Command] = {}
        self._ids = itertools.count(1)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stop = asyncio.Event()
        #: The exit code of a process that ended before all served.
        self._failed = 0
        #: All serve, or one has failed.
        self._opened = asyncio.Event()

    # --- life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> int:
        """Start all; returns when all serve, or else the exit code of one that could not."""
        for number in range(self._wanted):
            self._own(self._keep(number))
        await self._opened.wait()
        return self._failed

    def signal(self, number: signal.Signals) -> None:
        """Pass a signal on."""
        for child in self._children.values():
            if child.serving or number != signal.SIGHUP:  # one that starts reads all files anyhow
                child.process.send_signal(number)  # does nothing if it has ended

    async def close(self) -> None:
        """Let all drain and end; kill what does not."""
        self._stop.set()
        self.signal(signal.SIGTERM)
        http = self._start.http
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=http.linger + http.drain_timeout + _GOODBYE)
            if late:
                self.signal(signal.SIGKILL)
                await asyncio.wait(late)
        if self._table is not None:
            self._table.close()
            os.close(self._quotas)

    def _own(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep(self, number: int) -> None:
        """Keep the process with this number running."""
        pause = _PAUSE
        while not self._stop.is_set():
            child = await self._spawn(number)
            code = await self._watch(child)
            if self._stop.is_set():
                return
            if not self._opened.is_set():
                self._failed = code or 1
                self._opened.set()
                return
            reason = signal.Signals(-code).name if code < 0 else f"exit {code}"
            self._deaths[reason] = self._deaths.get(reason, 0) + 1
            if asyncio.get_running_loop().time() - child.started > _SETTLED:
                pause = _PAUSE
            _logger.error("gateway process %d ended (%s); another starts in %.1f s", number, reason, pause)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stop.wait()
            pause = min(2 * pause, _PAUSE_MAX)

    async def _spawn(self, number: int) -> Child:
        ours, theirs = socket.socketpair()
        page = make_page()
        child = Child(number)
        descriptors = [theirs.fileno(), page] + ([self._quotas] if self._quotas >= 0 else [])
        command = [sys.executable, "-m", "rtml.serving.child", str(number), *map(str, descriptors)]
        environment = dict(os.environ)
        package = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
        try:
            # A process group of its own: Ctrl-C is for the supervisor, which lets all drain.
            child.process = subprocess.Popen(  # noqa: ASYNC220 - returns when the process has begun, a millisecond
                command, pass_fds=descriptors, env=environment, process_group=0
            )
            child.account = Account(page)
        finally:
            theirs.close()
            os.close(page)
        child.pipe = await Pipe.open(ours.detach())
        self._children[number] = child
        child.pipe.send(self._start)
        for command_ in self._commands.values():
            child.pipe.send(command_)
        child.pipe.send(Whole(sum(each.serving for each in self._children.values()), self._wanted))
        if self._stop.is_set():
            child.process.terminate()
        return child

    async def _watch(self, child: Child) -> int:
        """Hear the process until it has ended, and close its account; returns its exit code."""
        while (message := await child.pipe.receive()) is not None:
            self._hear(child, message)
        child.pipe.close()
        code = await self._ended(child.process)
        del self._children[child.number]
        self._ledger.close_account(child.account)
        if self._table is not None:
            self._table.forget(child.number)
        for waiter in child.owes.values():
            if not waiter.done():
                waiter.set_result(Answer(0))  # its successor gets the command at its start
        self._tell_all()
        return code

    async def _ended(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the end of a process that has closed its pipe."""
        ended = asyncio.Event()
        descriptor = os.pidfd_open(process.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(descriptor, ended.set)
        try:
            async with asyncio.timeout(_GOODBYE):
                await ended.wait()
        except TimeoutError:
            process.kill()
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        return process.wait()

    # --- what processes say -------------------------------------------------------------------------------------------

    def _hear(self, child: Child, message: Message) -> None:
        if isinstance(message, Counted):
            child.account.series.append(message.series)
        elif isinstance(message, Serving):
            child.serving = True
            self._tell_all()
        elif isinstance(message, Ask):
            child.pipe.send(Answer(message.id, text=self._metrics()))
        elif isinstance(message, Command):
            self._own(self._command(child, message))
        elif isinstance(message, Answer):
            waiter = child.owes.pop(message.id, None)
            if waiter is not None and not waiter.done():
                waiter.set_result(message)

    def _tell_all(self) -> None:
        """Tell every process how many serve."""
        serving = sum(child.serving for child in self._children.values())
        for child in self._children.values():
            child.pipe.send(Whole(serving, self._wanted))
        if serving == self._wanted:
            self._opened.set()

    def _metrics(self) -> str:
        total = self._ledger.total(child.account for child in self._children.values())
        serving = sum(child.serving for child in self._children.values())
        total.aliases_shown = self._start.http.triton_metrics
        total.processes.labels("serving").value = serving
        total.processes.labels("missing").value = self._wanted - serving
        for reason, count in self._deaths.items():
            total.process_deaths.labels(reason).value = count
        return total.render()

    async def _command(self, origin: Child, command: Command) -> None:
        """Have all processes do what one of them was asked for; the first error is the answer."""
        number = next(self._ids)
        told = Command(number, command.kind, command.key, command.payload, command.ask)
        loop = asyncio.get_running_loop()
        waiters = []
        for child in self._children.values():
            if command.ask and not child.serving:
                continue  # it has nothing to say yet
            waiters.append(child.owes.setdefault(number, loop.create_future()))
            child.pipe.send(told)
        answers = await asyncio.gather(*waiters)
        error = next((answer for answer in answers if answer.error), None)
        if error is None and command.ask:
            origin.pipe.send(Answer(command.id, texts=[answer.text for answer in answers if answer.text]))
        elif error is None:
            self._commands.pop(command.key, None)  # the order of keys is that of their last commands
            self._commands[command.key] = told
            origin.pipe.send(Answer(command.id))
        else:
            origin.pipe.send(Answer(command.id, error=error.error, status=error.status))


@contextlib.contextmanager
def reserved(host: str, port: int) -> Iterator[int]:
    """Hold a port that processes will share, without listening.

    Yields:
        The port.

    Raises:
        AddressError: it cannot be used.
    """
    with contextlib.ExitStack() as held:
        try:
            for family, kind, protocol, _, address in socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            ):
                if port:
                    # Processes that share a port would share it with another gateway, too: look for one first.
                    with socket.socket(family, kind, protocol) as probe:
                        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        _bind(probe, (address[0], port, *address[2:]))
                holder = held.enter_context(socket.socket(family, kind, protocol))
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                _bind(holder, (address[0], port, *address[2:]))
                port = holder.getsockname()[1]
        except OSError as error:
            raise AddressError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None
        yield port


def _bind(one: socket.socket, address: Any) -> None:
    if one.family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    one.bind(address)


async def supervise(
    start: Start,
    say: Callable[[str], None],
    lines: Sequence[str],
    stop: asyncio.Event,
    hopeless: Callable[[], bool] = lambda: False,
) -> int:
    """Run the processes until `stop` is set; a signal that comes later is passed on.

    Args:
        start: What to serve, with the port that is reserved.
        say: Tells the operator a line.
        lines: To say when all serve.
        stop: Ends it.
        hopeless: Whether there is nothing to wait for then, as nobody will answer what is running.

    Returns:
        The exit code.
    """
    loop = asyncio.get_running_loop()
    supervisor = Supervisor(start, start.http.processes)
    if start.http.tokens or start.http.tls_cert or start.http.access_log:
        loop.add_signal_handler(signal.SIGHUP, supervisor.signal, signal.SIGHUP)
    try:
        opening = asyncio.create_task(supervisor.open())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({opening, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if opening.done() and opening.result():
            return opening.result()
        opening.cancel()
        if not stop.is_set():
            for line in lines:
                say(line)
            await stop.wait()
        say("stopping: no new requests; a second signal does not wait for those that run")
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, supervisor.signal, signal.SIGTERM)
        if hopeless():
            supervisor.signal(signal.SIGINT)  # and SIGTERM follows: two signals are those that do not wait
        return 0
    finally:
        await supervisor.close()
