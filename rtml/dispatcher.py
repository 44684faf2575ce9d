"""The dispatcher process: sockets and a clock around `rtml.graph.core.Core`; it decides nothing.

    python -m rtml.dispatcher --listen unix:/run/rtml/dispatcher.sock [--listen tcp://127.0.0.1:7411]

One thread, one loop, no event library: a wake-up drains every link (bounded), decodes, calls the core once with one
`now`, sends one frame to each peer it has something for, and sleeps until the next frame or timer. It never unpickles
anything and never looks into payloads.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import random
import signal
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final

import msgspec

from rtml.announcer import Announcer
from rtml.graph.calls import Calls
from rtml.graph.core import Core
from rtml.graph.policy import DEFAULT, POLICIES, TURNS_MAX, Scheduling
from rtml.graph.tables import (
    LIMITS_HELP,
    Ahead,
    Answer,
    Close,
    Effect,
    Ended,
    Knock,
    LetGo,
    Limits,
    Send,
    Sweep,
    Unlink,
)
from rtml.link import AddressError, Hub
from rtml.link.dial import RESEND, UPLINK, Dialler
from rtml.link.keys import NODE, hub_keys, peer_keys
from rtml.link.knocking import Knocker
from rtml.messages import (
    CLIENT,
    EXECUTORS,
    OUTCOMES,
    SUPERVISOR,
    Message,
    ObjectRef,
    Query,
    Reply,
    decode,
    encode,
)
from rtml.metrics import DispatcherMetrics
from rtml.settings import plain
from rtml.transfer import counts

log = logging.getLogger("rtml.dispatcher")

#: Ended tasks that `rtml trace` can look back on.
TRACE_TASKS_MAX: Final = 50_000

#: Ended tasks are counted into the metrics in bulk, off the path of a request.
_COUNT_AT: Final = 2_048

#: Wake-ups that are counted at a time, and ended tasks of which records are made: a fresh task's costs twice as much as
#: the next one's.
_REMEMBER_AT: Final = 64

#: Bytes of garbage quoted in a log line.
_QUOTE: Final = 60


class Dispatcher:
    """The loop.

    Args:
        hub: listening links; owned and closed by the dispatcher.
        core: the brain.
        metrics: where ended tasks are counted.
        shm_dir: directory of shared-memory segments, to remove those of dead owners; "" if there is none.
        uplink: the connection to the dispatcher above this one; closed by the dispatcher.
    """

    def __init__(
        self, hub: Hub, core: Core, metrics: DispatcherMetrics, shm_dir: str = "", uplink: Dialler | None = None
    ) -> None:
        self.hub = hub
        self.uplink = uplink
        self.core = core
        self.metrics = metrics
        self.shm_dir = shm_dir
        self.history: deque[Ended] = deque(maxlen=TRACE_TASKS_MAX)
        self._uncounted: list[Ended] = []
        #: not yet counted: seconds of wake-ups, bytes of frames
        self._turns: list[float] = []
        self._arrived: list[int] = []
        self._sent: list[int] = []
        self._calls = Calls()
        self._garbage: Counter[str] = Counter()
        self._stopping = False
        #: tells the node's data endpoint what tasks will need
        self.announcer = Announcer("")
        self.knocker = Knocker(hub)

    def stop(self) -> None:
        """Leave `run` after the current wake-up."""
        self._stopping = True

    def run(self) -> None:
        """Serve until `stop`."""
        core, hub, uplink = self.core, self.hub, self.uplink
        clock = time.monotonic
        notices, ended = core.notices, core.tables.ended
        turns, arrived, timers = self._turns, self._arrived, core.tables.timers
        refused = self.knocker.refused
        while not self._stopping:
            timeout = max(0.0, timers[0][0] - clock()) if timers else None
            if uplink is not None and uplink.waiting:
                timeout = RESEND if timeout is None else min(timeout, RESEND)
            frames = hub.poll(timeout)
            now = clock()
            if uplink is not None:
                frames += self._above(uplink, now)
            arrivals: list[tuple[int, list[Message] | None]] = []
            for peer, frame in frames:
                if frame is None:
                    arrivals.append((peer, None))
                    continue
                arrived.append(len(frame))
                try:
                    arrivals.append((peer, decode(frame)))
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    self._reject(peer, frame, error)
            self._execute(core.handle(arrivals, now))
            while refused:
                self._execute(core.knocked(self.knocker.take(), now))
            # From here on the others work: what they do not wait for costs no latency.
            late = core.settle()
            if late:
                self._execute(late)
            while notices:
                log.warning("%s", notices.pop(0))
            turns.append(clock() - now)
            if len(turns) >= _REMEMBER_AT or len(ended) >= _REMEMBER_AT:
                self._remember()

    def _above(self, uplink: Dialler, now: float) -> list[tuple[int, bytes | None]]:
        """What came from the dispatcher above; a new connection begins with an introduction."""
        lost, frames, fresh = uplink.poll()
        trouble = uplink.trouble()
        if trouble:
            log.warning("no connection to the dispatcher above: %s; trying on", trouble)
        if lost:
            log.warning("lost the dispatcher at %s; connecting again", uplink.address)
            self._execute(self.core.handle([(UPLINK, None)], now))
        if fresh:
            log.info("connected to the dispatcher at %s", uplink.address)
            self._execute(self.core.connected(UPLINK, now))
        return [(UPLINK, frame) for frame in frames]

    def _reject(self, peer: int, frame: bytes, error: Exception) -> None:
        """Garbage: counted, and logged the first time this kind comes."""
        reason = type(error).__name__
        self.metrics.rejected.labels(reason).value += 1
        self._garbage[reason] += 1
        if self._garbage[reason] == 1:
            who = self.hub.credentials(peer)
            sender = f"pid {who[0]}" if who else f"link {peer}"
            log.warning(
                "dropped a frame of %d bytes from %s that is no message (%s): %r; more are only counted",
                len(frame),
                sender,
                error,
                frame[:_QUOTE],
            )

    def _execute(self, effects: list[Effect]) -> None:
        hub = self.hub
        for effect in effects:
            if effect.__class__ is Send:
                frame = encode(effect.messages)
                if effect.peer != UPLINK:
                    hub.send(effect.peer, frame)
                elif self.uplink is not None:
                    self.uplink.send(frame)
                self._sent.append(len(frame))
            elif isinstance(effect, Answer):
                hub.send(effect.peer, encode([Reply(effect.query.id, self._answer(effect.query))]))
            elif isinstance(effect, Close):
                if effect.peer != UPLINK:
                    hub.close_peer(effect.peer)
                elif self.uplink is not None:
                    self.uplink.hang_up()
            elif isinstance(effect, Ahead):
                self.announcer.announce(effect.refs)
            elif isinstance(effect, LetGo):
                self.announcer.let_go(effect.objects)
            elif isinstance(effect, Knock):
                self.knocker.knock(effect)
            elif isinstance(effect, Unlink):
                self._unlink(effect.ref)
            elif isinstance(effect, Sweep):
                self._sweep(effect)

    def _unlink(self, ref: ObjectRef) -> None:
        """Remove a segment whose owner is dead. The name was checked to be one file of our directory."""
        if self.shm_dir and os.path.basename(ref.segment) == ref.segment:
            try:
                os.unlink(os.path.join(self.shm_dir, ref.segment))
            except OSError:
                pass  # swept with its dead owner's other segments

    def _sweep(self, effect: Sweep) -> None:
        """Remove what a dead executor left. Segments begin with their owner's session (`rtml.store`)."""
        if self.shm_dir:
            for path in Path(self.shm_dir).glob(f"{effect.session:08x}-*"):
                if path.name not in effect.keep:
                    path.unlink(missing_ok=True)

    # --- what operators ask

    def _remember(self) -> None:
        """Count wake-ups and frames, and make records of the tasks that ended lately."""
        self.metrics.turn.labels().observe_all(self._turns)
        self._turns.clear()
        for way, sizes in (("in", self._arrived), ("out", self._sent)):
            self.metrics.frames.labels(way).value += len(sizes)
            self.metrics.bytes.labels(way).value += sum(sizes)
            sizes.clear()
        ended = self.core.take_ended()
        self.history.extend(ended)
        self._uncounted += ended
        if len(self._uncounted) >= _COUNT_AT:
            self._count()

    def _count(self) -> None:
        """Move ended tasks into the metrics."""
        self._calls.count(self._uncounted)
        by_function: dict[str, list[Ended]] = {}
        for end in self._uncounted:
            of_function = by_function.get(end.function)
            if of_function is None:
                by_function[end.function] = [end]
            else:
                of_function.append(end)
        self._uncounted = []
        for function, ended in by_function.items():
            self.metrics.meter(function).count(ended)

    def _answer(self, query: Query) -> str:
        self._remember()
        if query.what == "metrics":
            self._count()
            snapshot = self.core.snapshot()
            for state, count in snapshot["tasks"].items():
                self.metrics.live.labels(state).value = count
            for role in (CLIENT, *EXECUTORS, SUPERVISOR):
                self.metrics.peers.labels(role).value = snapshot["peers"].get(role, 0)
            for reason, deaths in self.core.deaths.items():
                self.metrics.deaths.labels(reason).value = deaths
            hedging = self.core.hedging
            for outcome, count in (("won", hedging.won), ("lost", hedging.lost), ("capped", hedging.capped)):
                self.metrics.hedges.labels(outcome).value = count
            self.metrics.wasted.labels().value = self.core.tables.wasted
            self.metrics.observe_transfers(counts.read(self.shm_dir))
            self.metrics.loop_lag.labels().observe_all(list(self.core.lags))
            self.core.lags.clear()
            executors: Counter[tuple[str, str]] = Counter()
            for node in snapshot["nodes"]:
                for worker in node["executors"]:
                    state = "blocked" if worker["blocked"] else "busy" if worker["queued"] else "idle"
                    executors[worker["role"], state] += 1
            for role in EXECUTORS:
                for state in ("idle", "busy", "blocked"):
                    self.metrics.executors.labels(role, state).value = executors[role, state]
            return self.metrics.render()
        if query.what == "status":
            snapshot = self.core.snapshot()
            snapshot["pid"] = os.getpid()
            snapshot["rejected_frames"] = sum(self._garbage.values())
            return _json(snapshot)
        if query.what == "trace":
            return _json(self._trace(query.argument))
        if query.what == "calls":
            self._count()
            return _json(self._calls.describe())
        return _json({"error": f"unknown question {query.what!r}; ask for status, metrics, trace, calls or actor"})

    def _trace(self, argument: str) -> dict[str, Any]:
        """The ended tasks of one graph (by its id or trace id; the last one if empty), times relative to its start."""
        wanted = argument.strip()
        records: list[Ended] = []
        if wanted:
            records = [end for end in self.history if wanted in (str(end.graph), end.trace)]
        elif self.history:
            last = self.history[-1].graph
            records = [end for end in self.history if end.graph == last]
        if not records:
            return {"graph": wanted, "tasks": []}
        start = min(end.submitted for end in records)
        tasks = [
            {
                "id": end.task,
                "parent": end.parent,
                "function": end.function,
                "outcome": OUTCOMES[end.outcome],
                "attempts": end.attempts,
                "submitted": end.submitted - start,
                "ready": end.ready - start if end.ready else None,
                "assigned": end.assigned - start if end.assigned else None,
                "finished": end.finished - start,
                "run": end.run,
                "worker": end.worker,
                "batch": end.batch,
            }
            for end in sorted(records, key=lambda end: end.submitted)
        ]
        return {"graph": str(records[0].graph), "trace": records[0].trace, "tasks": tasks}


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rtml dispatcher", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument(
        "--listen",
        action="append",
        required=True,
        metavar="ADDRESS",
        help="unix:/path, ipc:///path or tcp://host:port; may be given several times",
    )
    parser.add_argument("--keys", default="", metavar="DIR", help="keys for tcp addresses (RTML_KEYS); see rtml keys")
    parser.add_argument(
        "--uplink", default="", metavar="ADDRESS", help="of the dispatcher above, for which this one is a node"
    )
    parser.add_argument("--node", default="", metavar="NAME", help="this node's name over there")
    parser.add_argument("--shm-dir", default="", help="directory of this node's shared-memory segments")
    parser.add_argument("--data", default="", metavar="HOST:PORT", help="this node's data endpoint, for others")
    parser.add_argument("--data-socket", default="", metavar="PATH", help="and its Unix socket")
    parser.add_argument(
        "--policy", choices=sorted(POLICIES), default=DEFAULT, help=f"order of ready tasks (default {DEFAULT})"
    )
    parser.add_argument(
        "--tenant-weight",
        action="append",
        default=[],
        type=_weight,
        metavar="NAME=TURNS",
        help="turns in a row of a tenant's tasks where others wait too (default 1); may be given several times",
    )
    parser.add_argument(
        "--blind", action="store_true", help="place tasks without regard to where their arguments are, for comparisons"
    )
    defaults = Limits()
    for name, value in defaults._asdict().items():
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=_whole if isinstance(value, int) else _amount,
            default=value,
            help=f"{LIMITS_HELP[name]} (default {plain(value)})",
        )
    return parser


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number that is not negative, got {text!r}")
    return value


def _weight(text: str) -> tuple[str, int]:
    name, _, turns = text.rpartition("=")
    if not name or not turns.isdigit() or not 1 <= int(turns) <= TURNS_MAX:
        raise argparse.ArgumentTypeError(f"expected NAME=TURNS with 1 to {TURNS_MAX} turns, got {text!r}")
    return name, int(turns)


def main(arguments: list[str] | None = None, say: Callable[[str], None] | None = None) -> None:
    """Run a dispatcher until SIGTERM or SIGINT.

    Args:
        arguments: of the command.
        say: tells the operator where it listens; None is for dispatchers that a supervisor starts.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    limits = Limits(**{name: getattr(options, name) for name in Limits._fields})
    # Not a matter of security, and the only randomness: two dispatchers of the same peers must differ.
    epoch = random.SystemRandom().getrandbits(62) | 1
    metrics = DispatcherMetrics()
    hub = Hub()
    try:
        uplink = _uplink(options, hub)
    except AddressError as error:
        sys.stderr.write(f"rtml dispatcher: {error}\n")
        raise SystemExit(2) from None
    name = (options.node or f"{socket.gethostname()}-{os.getpid()}") if uplink is not None else ""
    scheduling = Scheduling(POLICIES[options.policy], dict(options.tenant_weight), options.blind)
    core = Core(epoch, limits, name, scheduling)
    core.tables.data = options.data
    core.membership.is_guest = hub.is_guest
    dispatcher = Dispatcher(hub, core, metrics, options.shm_dir, uplink)
    dispatcher.announcer = Announcer(options.data_socket)
    readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def on_signal(number: int, frame: FrameType | None) -> None:
        dispatcher.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    signal.set_wakeup_fd(writable)
    hub.add_fd(readable)
    try:
        places = _listen(options, hub)
        # Start-up objects are never garbage, and reference counting frees tasks: the collector is for accidents.
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000, 50, 100)
        metrics.watch_gc(metrics.gc_pause.labels())
        if uplink is not None:
            uplink.start()
        if say is not None:
            work = f"works for {uplink.address}" if uplink is not None else "tasks run on nodes that join (rtml worker)"
            say(f"rtml dispatcher: listening at {', '.join(places)}; policy {options.policy}; {work}")
        dispatcher.run()
    finally:
        if uplink is not None:
            uplink.close()
        dispatcher.knocker.close()
        hub.close()


def _listen(options: argparse.Namespace, hub: Hub) -> list[str]:
    """Open all addresses; returns them with their real ports. One that cannot be used ends the process."""
    places = []
    for address in options.listen:
        try:
            keys = hub_keys(options.keys) if options.keys and address.startswith("tcp://") else None
            places.append(hub.listen(address, keys))
        except AddressError as error:
            sys.stderr.write(f"rtml dispatcher: {error}\n")
            raise SystemExit(2) from None
    return places


def _uplink(options: argparse.Namespace, hub: Hub) -> Dialler | None:
    if not options.uplink:
        return None
    keys = peer_keys(options.keys, NODE) if options.keys and options.uplink.startswith("tcp://") else None
    return Dialler(options.uplink, keys, hub)


if __name__ == "__main__":
    main()
