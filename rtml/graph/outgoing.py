"""What a wake-up sends: one frame to each peer, with everything that was decided for it."""

from __future__ import annotations

from typing import Final

from rtml.graph.remote import Remote
from rtml.graph.state import inline_bytes
from rtml.graph.tables import Effect, Send, Tables
from rtml.messages import DISPATCHER, Assign, Attempt, Logs, Results, Safe, WatchResults

#: Results in one frame: at most 32 MiB of payloads.
RESULTS_MAX: Final = 512

#: Bytes of resolved dependencies in one frame, where several attempts go to one executor.
FRAME_DEPENDENCIES_MAX: Final = 8 * 1024 * 1024

#: So many messages of an executor are safe before it is told (with its next message) that it may forget them. A
#: dispatcher below, which keeps a record of every task, is told with each.
SAFE_LAG_MAX: Final = 8


def flush(tables: Tables, remote: Remote) -> list[Effect]:
    """The effects of a wake-up: what other parts asked for, and a frame for each peer that is told something."""
    effects = tables.effects
    for session in tables.dirty.values():
        peer = session.peer
        if peer is None:
            continue
        if session.results and session.role == DISPATCHER:
            remote.answers(session)
        messages = session.outbox
        session.outbox = []
        worker = session.worker
        if worker is not None:
            attempts = worker.outgoing
            if attempts:
                worker.outgoing = []
                if len(attempts) > 1:
                    *earlier, attempts = _in_frames(attempts)
                    for part in earlier:
                        effects.append(Send(peer, [*messages, Assign(part)]))
                        messages = []
                messages.append(Assign(attempts))
            lag = worker.safe - worker.safe_sent
            if lag and (lag >= SAFE_LAG_MAX or (messages and worker.role == DISPATCHER)):
                messages.append(Safe(worker.safe))
                worker.safe_sent = worker.safe
        if session.results:
            results = session.results
            session.results = []
            while results:
                session.serial = serial = session.serial + 1
                numbered = Results(serial, results if len(results) <= RESULTS_MAX else results[:RESULTS_MAX])
                # Kept until it is acknowledged.
                session.unacked.append(numbered)
                messages.append(numbered)
                results = results[RESULTS_MAX:]
                if results:
                    effects.append(Send(peer, messages))
                    messages = []
        if session.watch_results:
            messages.append(WatchResults(session.watch_results))
            session.watch_results = []
        if messages:
            effects.append(Send(peer, messages))
    tables.dirty.clear()
    tables.effects = []
    return effects


def pass_on(tables: Tables, lines: list[tuple[int, str, int, str, str]]) -> None:
    """Give what tasks printed to those who submitted their graphs."""
    by_root: dict[int, list[tuple[int, str, int, str, str]]] = {}
    for line in lines:
        task = tables.tasks.get(line[0])
        # A task that has ended and is forgotten: its lines go to the submitter named in its id, if any.
        submitter = line[0] >> 32 if task is None else task.graph.session.id
        by_root.setdefault(submitter, []).append(line)
    for session_id, own in by_root.items():
        root = tables.sessions.get(session_id)
        if root is not None and root.peer is not None:
            tables.tell(root, Logs(own))


def _in_frames(attempts: list[Attempt]) -> list[list[Attempt]]:
    """Attempts in as many parts as their dependencies need frames; the calls of a batch stay together."""
    if not any(attempt.deps for attempt in attempts):
        return [attempts]
    parts: list[list[Attempt]] = [[]]
    size = 0
    for attempt in attempts:
        size += inline_bytes(attempt.deps or ())
        part = parts[-1]
        if size > FRAME_DEPENDENCIES_MAX and part and not (attempt.batch and attempt.batch == part[-1].batch):
            parts.append([])
            size = inline_bytes(attempt.deps or ())
        parts[-1].append(attempt)
    return parts
