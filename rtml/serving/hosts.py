"""Named actors behind a gateway: whoever of its processes comes first makes one, the others find it."""

from __future__ import annotations

import asyncio
from typing import Any, Final, NamedTuple

import msgspec

from rtml.client.actors import Actor, ActorClass, actor_at, ended, stop
from rtml.client.client import Client
from rtml.client.future import Future
from rtml.errors import ActorDied, ConnectionLost, RtmlError
from rtml.messages import Options, Timing

#: Times that two processes may get in each other's way while they make or end an actor.
_ATTEMPTS: Final = 5


class HostPlan(NamedTuple):
    """What makes an actor."""

    #: Equal names are equal actors.
    name: str
    cls: Any
    args: tuple[Any, ...]
    #: Options of the actor beside name and lifetime.
    options: dict[str, Any]
    #: Options of its methods' calls, where the class does not say them.
    methods: dict[str, Options]


class Answer(NamedTuple):
    """How a call on a host ended."""

    value: Any
    error: BaseException | None
    timing: Timing | None

    def get(self) -> Any:
        """The value. Raises the error."""
        if self.error is not None:
            raise self.error
        return self.value


class Host:
    """An actor that outlives this process, and is started again after its own dies.

    Args:
        client: Of the engine, on the running loop.
        plan: What makes it.
        user: This process's name for it.
    """

    def __init__(self, client: Client, plan: HostPlan, user: str) -> None:
        self._client = client
        self._plan = plan
        self.user = user
        self._actor: Actor | None = None

    async def connect(self) -> Any:
        """Find or make it. Returns what its method `attach(user)` answers, once its constructor has run.

        Raises:
            RtmlError: it cannot be made; or what its constructor raised.
        """
        for attempt in range(_ATTEMPTS):
            actor, mine = await self._get()
            self._actor = actor
            try:
                return (await self.call("attach", self.user)).get()
            except ActorDied as died:
                # It was ended at this moment, or somebody else was faster with the name.
                reason = await self._reason(actor, died) if mine else died
                if mine and not _is_taken(reason):
                    raise reason from None
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("not reached")

    async def _get(self) -> tuple[Actor, bool]:
        plan = self._plan
        try:
            # A question to the dispatcher blocks; it is rare enough to have a thread.
            return await asyncio.to_thread(actor_at, self._client, plan.name), False
        except LookupError:
            pass
        except TimeoutError as silent:
            raise ConnectionLost("the engine does not answer") from silent
        made = ActorClass(plan.cls, {**plan.options, "name": plan.name, "lifetime": "detached", "max_restarts": -1})
        methods = {**made.actor_options.methods, **plan.methods}
        made.actor_options = msgspec.structs.replace(made.actor_options, methods=methods)
        return made.create_at(self._client, plan.args, {}), True

    async def _reason(self, actor: Actor, died: ActorDied) -> BaseException:
        """Why an actor that was made here has ended: what its constructor raised says more than its calls."""
        return (await _settle(ended(actor))).error or died

    def submit(self, method: str, *args: Any) -> asyncio.Task[Answer]:
        """Call a method; calls run in the order of their submission.

        Whoever awaits the call may give up, the call goes on: what changes a state is not stopped half-way.

        Raises:
            RtmlError: the call cannot be sent.
        """
        if self._actor is None:
            raise ConnectionLost("it is not there yet")
        future = getattr(self._actor, method).submit(*args)
        return asyncio.get_running_loop().create_task(_settle(future))

    async def call(self, method: str, *args: Any) -> Answer:
        """Call a method and wait for its end."""
        return await asyncio.shield(self.submit(method, *args))

    def stop(self) -> None:
        """End it after the calls so far."""
        if self._actor is not None:
            stop(self._actor)
            self._actor = None


async def _settle(future: Future[Any]) -> Answer:
    try:
        value = await future
    except Exception as error:  # noqa: BLE001 - whoever asks gets it
        return Answer(None, error, future.timing)
    return Answer(value, None, future.timing)


def _is_taken(error: BaseException) -> bool:
    return isinstance(error, RtmlError) and "exists already" in str(error)
