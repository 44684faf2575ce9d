"""Watching coroutines: which one's step is running now, and whether it holds the loop up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final

from rtml.messages import LoopLag
from rtml.workers.page import COUNT, FIRST

#: A step longer than this, in seconds, is a lag: the loop gets no new work until it is over.
LAG_S: Final = 0.05
_WATCH_S: Final = LAG_S / 2


class CarriedError(Exception):
    """Takes an exception through the loop that would otherwise end it (SystemExit, KeyboardInterrupt)."""


class Steps(Coroutine[Any, Any, Any]):
    """A coroutine that shows in the running page whenever it runs.

    Args:
        coroutine: of user code.
        task: whose.
        watch: shows it.
        returned: called with what the coroutine returns, before the loop knows, which would say so a turn later.
    """

    __slots__ = ("_coroutine", "_id", "_returned", "_watch")

    def __init__(self, coroutine: Any, task: int, watch: Watch, returned: Callable[[Any], None]) -> None:
        self._coroutine = coroutine
        self._id = task
        self._watch = watch
        self._returned = returned

    def send(self, value: Any) -> Any:
        """See `Coroutine`."""
        try:
            return self.run(self._coroutine.send, value)
        except StopIteration as end:
            self._returned(end.value)
            raise

    def throw(self, *error: Any) -> Any:
        """See `Coroutine`."""
        return self.run(self._coroutine.throw, *error)

    def close(self) -> None:
        """See `Coroutine`."""
        self._coroutine.close()

    def run(self, step: Callable[..., Any], *values: Any) -> Any:
        """One step, shown in the page."""
        self._watch.enter(self._id)
        try:
            return step(*values)
        except (SystemExit, KeyboardInterrupt) as error:
            raise CarriedError from error
        finally:
            self._watch.leave()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise TypeError("made for the event loop alone")


class Watch:
    """Knows what the loop is doing, shows it in the running page, and reports what holds the loop up.

    The latter is noticed by a thread, which sleeps while there are no coroutines.

    Args:
        page: this process's slot of the running page.
        report: sends a message, from any thread.
    """

    def __init__(self, page: memoryview, report: Callable[[LoopLag], None]) -> None:
        self._page = page
        self._report = report
        #: Steps begun so far.
        self.step = 0
        #: The task whose step was reported, 0 if the loop turns.
        self.lagging = 0
        #: There are coroutines; and what the thread waits for, which it takes back itself when there are none any more.
        self._busy = False
        self._active = threading.Event()
        self._started = False

    def enter(self, task: int) -> None:
        """The loop turns to this task: a step of its code, its arguments or its result."""
        self._page[FIRST] = task
        self._page[COUNT] = 1
        self.step += 1

    def leave(self) -> None:
        """It is done with it for now."""
        self._page[COUNT] = 0
        if self.lagging:
            self.turned()

    def busy(self) -> None:
        """There are coroutines."""
        self._busy = True
        if not self._started:
            self._started = True
            threading.Thread(target=self._run, name="rtml-watch", daemon=True).start()
        if not self._active.is_set():
            self._active.set()

    def idle(self) -> None:
        """There are none."""
        self._busy = False

    def _rest(self) -> None:
        """Have the thread wait for the next coroutine."""
        self._active.clear()
        if self._busy:  # it has come since then
            self._active.set()

    def turned(self) -> None:
        """The step that was reported is over."""
        task, self.lagging = self.lagging, 0
        self._report(LoopLag(task=task, lag=0.0))

    def _run(self) -> None:
        seen, since = 0, 0.0
        while True:
            self._active.wait()
            time.sleep(_WATCH_S)
            if not self._busy:
                self._rest()
                continue
            now = time.monotonic()
            if not self._page[COUNT] or self.step != seen:
                seen, since = self.step, now
            elif not self.lagging and now - since >= LAG_S:
                self.lagging = task = self._page[FIRST]
                self._report(LoopLag(task=task, lag=now - since))
                if self.step != seen and self.lagging:
                    self.turned()  # it ended while it was being reported
