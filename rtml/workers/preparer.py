"""Functions made ready beside what runs: a thread that loads models while the executor goes on with its tasks.

A model takes from a millisecond to seconds to open, and what was to be quick would wait behind it. So the dispatcher
says beforehand what will be needed (`Prepare`); here it is imported or unpickled, loaded and warmed up at the lowest
priority, and only then the dispatcher hears that it is ready.
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Final

from rtml import codec
from rtml.messages import ErrorInfo, Function, Message, Prepared
from rtml.workers.calls import Calls
from rtml.workers.core import WorkerCore

_NICE_MAX: Final = 19


class Preparer:
    """Makes ready and lets go what the core was told to. Everything but `_run` belongs to the core's thread.

    Args:
        core: `wanted` and `forgotten` are taken from it.
        calls: gets the functions.
        send: sends messages, from any thread.
    """

    def __init__(self, core: WorkerCore, calls: Calls, send: Callable[[list[Message]], None]) -> None:
        self._core = core
        self._calls = calls
        self._send = send
        self._thread: threading.Thread | None = None
        #: None: functions were forgotten, and with them perhaps much memory.
        self._queue: queue.SimpleQueue[Function | None] = queue.SimpleQueue()

    def look(self) -> None:
        """Messages were applied."""
        core = self._core
        if core.forgotten:
            numbers, core.forgotten = core.forgotten, []
            self._calls.forget(numbers)
            if self._thread is not None:
                self._queue.put(None)
        if core.wanted:
            wanted, core.wanted = core.wanted, []
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rtml-preparer", daemon=True)
                self._thread.start()
            for function in wanted:
                self._queue.put(function)

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE_MAX)
        while True:
            function = self._queue.get()
            if function is None:
                _trim()
            else:
                self._send([self._prepare(function)])
            del function

    def _prepare(self, function: Function) -> Prepared:
        start = time.perf_counter()
        error: ErrorInfo | None = None
        try:
            self._calls.load(function)
        except BaseException as problem:  # noqa: BLE001 - user code: imports, __setstate__, __rtml_load__
            error = codec.encode_error(problem, [function.name], pickle=False)
        if function.id not in self._core.functions:
            self._calls.forget([function.id])  # nobody wants it any more
        return Prepared(function.id, time.perf_counter() - start, error)


def _trim() -> None:
    """Give freed memory back to the system: glibc keeps what lies below a block that is still in use."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        return  # another C library
