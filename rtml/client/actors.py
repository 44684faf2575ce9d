"""Actors: what `@rtml.actor` makes of a class, and the handles of what is created from it.

    @rtml.actor
    class Counter:
        def __init__(self, start=0): self.n = start
        def add(self, n): self.n += n; return self.n

    counter = Counter.create(10)            # in a process of its own
    future = counter.add.submit(1)          # calls run in the order of their submission
    Counter(10).add(1)                      # here, as if it were not decorated

An actor is a task that goes on until the actor ends (see `rtml.graph.actors`), so its handle is that task's future,
with the names of its methods. It travels as futures inside objects do: in arguments, results and closures. The actor
ends when the last handle of it is gone, or whoever created it, unless it is detached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Generic, ParamSpec, TypeVar, overload

import msgspec

from rtml import codec
from rtml.client import streams
from rtml.client.functions import RETRY_ON, importable, make_options, retry_types
from rtml.client.future import Future
from rtml.client.references import Lease
from rtml.errors import ActorDied, SubmitError
from rtml.messages import STOP, ActorOptions, Function, Options, Task

if TYPE_CHECKING:
    from rtml.client.client import Client
    from rtml.client.streams import Stream

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

#: Attribute of a method with the options of its calls, set by `method`.
_METHOD: Final = "__rtml_method__"

#: What classes, and what methods may ask for.
_CLASS_OPTIONS: Final = frozenset({"cpu", "gpu", "memory", "resources"})
_ACTOR_OPTIONS: Final = frozenset(
    {"name", "lifetime", "concurrency", "max_restarts", "checkpoint_calls", "checkpoint_seconds", "max_task_retries"}
)
_METHOD_OPTIONS: Final = frozenset(
    {"batch", "batch_delay", "retries", "timeout", "window", "latest", "max_age", "name"}
)
_CALL_OPTIONS: Final = frozenset({"retries", "timeout", "deadline", "detached", "window", "latest", "max_age"})

#: Calls at a time of a class with coroutine methods, if nothing is said.
_ASYNC_CONCURRENCY: Final = 1000
#: For ever, as far as restarts are concerned.
_ALWAYS: Final = 1 << 40


class ActorRef:
    """Holds an actor for as long as this process has handles of it, or unfinished calls on it."""

    __slots__ = ("__weakref__", "future", "held")

    def __init__(self, future: Future[Any], held: Any) -> None:
        self.future = future
        self.held = held

    def prepare(self, client: Client, task: Task) -> None:
        """The task is a call on this actor, see `Special`."""
        task.actor = self.future.id
        client._kept.setdefault(task.id, []).append(self)


class ActorClass(Generic[P, T]):
    """A class whose instances can live on workers. Calling it makes an instance here, as if it were not decorated.

    Args:
        cls: the plain class; stays reachable as `.function`.
        values: its options, as `actor` takes them.
    """

    def __init__(self, cls: Callable[P, T], values: dict[str, Any]) -> None:
        self.function = cls
        self.values = values
        self.options_, self.actor_options = _split(cls, values)
        self.__doc__ = cls.__doc__
        self.__name__ = cls.__name__
        self.__qualname__ = cls.__qualname__
        self.__module__ = cls.__module__
        #: The definition, and the client it was made for.
        self._described: tuple[Client, Function] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """An instance in this process."""
        return self.function(*args, **kwargs)

    def create(self, *args: Any, **kwargs: Any) -> Actor:
        """Start an actor: an instance in a process of its own. Does not wait for it; arguments may be futures.

        Raises:
            SubmitError: the class or the arguments cannot be sent.
        """
        from rtml.client.api import client

        return self.create_at(client(), args, kwargs)

    def create_at(self, here: Client, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Actor:
        """Start an actor at this client's engine, as `create` does."""
        described = self._described
        if described is None or described[0] is not here:
            function = here.describe(self.function, self.options_)
            if not function.asynchronous and _is_async(self.function):
                function = msgspec.structs.replace(function, asynchronous=True)
                function.id = codec.function_id(function)
                with here.lock:
                    here.core.define(function)
            described = self._described = (here, function)
        # A copy, as it says later whether this handle is held.
        hosts = msgspec.structs.replace(self.actor_options)
        overrides = Options(detached=True) if self.values.get("lifetime") == "detached" else None
        future = here.call(described[1], args, kwargs, overrides, special=_Creation(hosts))
        return Actor(_own_ref(future), self.__qualname__, hosts.methods, hosts.concurrency > 1)

    def options(self, **changes: Any) -> ActorClass[P, T]:
        """The same class with other options for its actors, see `actor`."""
        return ActorClass(self.function, {**self.values, **changes})

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.function,)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.function, name)

    def __reduce__(self) -> Any:
        return self.__qualname__ if importable(self) else (ActorClass, (self.function, self.values))

    def __repr__(self) -> str:
        return f"<rtml actor class {self.__qualname__}>"


class Actor:
    """The handle of an actor. Its attributes are the methods; `actor.method.submit(...)` gives a future."""

    def __init__(self, ref: ActorRef, name: str, methods: dict[str, Options], concurrent: bool = False) -> None:
        self.__dict__["_rtml"] = (ref, name, methods, concurrent)

    def __getattr__(self, name: str) -> ActorMethod:
        ref, cls, methods, concurrent = self.__dict__["_rtml"]
        options = methods.get(name)
        if options is None:
            if name.startswith("__"):
                raise AttributeError(name)
            raise AttributeError(f"actor {cls} has no method {name!r}; there are {', '.join(sorted(methods))}")
        method = self.__dict__[name] = ActorMethod(ref, f"{cls}.{name}", name, options, concurrent=concurrent)
        return method

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"the attributes of an actor live in its process: give it a method that sets {name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Actor) and ended(self).id == ended(other).id

    def __hash__(self) -> int:
        return hash(ended(self).id)

    def __reduce__(self) -> Any:
        ref, *rest = self.__dict__["_rtml"]
        return _rebuild, (ref.future, *rest)

    def __repr__(self) -> str:
        ref, name, *_ = self.__dict__["_rtml"]
        return f"<rtml actor {name} {ref.future.id:#x}>"


class ActorMethod:
    """A method of an actor, to be submitted."""

    __slots__ = ("_concurrent", "_described", "_name", "_options", "_overrides", "_ref", "_shown")

    def __init__(
        self,
        ref: ActorRef,
        shown: str,
        name: str,
        options: Options,
        overrides: Options | None = None,
        concurrent: bool = False,
    ) -> None:
        self._ref = ref
        self._shown = shown
        self._name = name
        self._options = options
        self._overrides = overrides
        self._concurrent = concurrent
        self._described: Function | None = None

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call it, see `Client.submit`. What one process submits to one actor runs in that order."""
        function = self._described or self._describe()
        return self._ref.future._client.call(function, args, kwargs, self._overrides, special=self._ref)

    def stream(self, *args: Any, **kwargs: Any) -> Stream[Any]:
        """Call a method that is a generator; gives its items as they come."""
        function = self._described or self._describe()
        return streams.start(self._ref.future._client, function, args, kwargs, self._overrides, self._ref)

    def _describe(self) -> Function:
        client = self._ref.future._client
        function = self._described = codec.describe_method(self._shown, self._name, self._options, self._concurrent)
        with client.lock:
            client.core.define(function)
        return function

    def options(self, **changes: Any) -> ActorMethod:
        """The same method with other options for its calls: retries, timeout, deadline, detached."""
        _known(changes, _CALL_OPTIONS, "a call on an actor")
        base = {} if self._overrides is None else msgspec.structs.asdict(self._overrides)
        overrides = make_options({**base, **changes})
        return ActorMethod(self._ref, self._shown, self._name, self._options, overrides, self._concurrent)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"a method of an actor runs in its process: {self._shown}.submit(...) gives a future")


@overload
def actor(cls: Callable[P, T], /) -> ActorClass[P, T]: ...
@overload
def actor(**options: Any) -> Callable[[Callable[P, T]], ActorClass[P, T]]: ...
def actor(cls: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a class one of actors: `@rtml.actor`, or `@rtml.actor(gpu=1, max_restarts=3, ...)`.

    Args:
        cls: the class to decorate.
        **options: `cpu` (0), `gpu`, `memory` in bytes, `resources`: the actor's own for life; `concurrency`: calls at a
            time (1, or 1000 for a class with coroutine methods); `name`, under which `rtml.get_actor` finds it;
            `lifetime="detached"`: it outlives its creator and its handles; `max_restarts` after its process died (0;
            -1 for ever); `max_task_retries`: further attempts of calls that were running then (0);
            `checkpoint_calls`, `checkpoint_seconds`: how often `__rtml_save__()` is asked for the state that
            `__rtml_restore__(state)` gets after a restart.

    Raises:
        SubmitError: an option is unknown or makes no sense.
    """
    if cls is None:
        return lambda decorated: _decorate(decorated, options)
    return _decorate(cls, options)


@overload
def method(function: F, /) -> F: ...
@overload
def method(**options: Any) -> Callable[[F], F]: ...
def method(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Options of a method's calls: `@rtml.method(batch=16)`, `retries`, `retry_on`, `timeout`, `batch_delay`.

    With `batch`, up to so many calls, of whatever callers, are executed as one: the method takes and returns lists.

    Raises:
        SubmitError: an option is unknown or makes no sense.
    """
    if function is None:
        return lambda decorated: method(decorated, **options)
    retry_on = retry_types(options.pop("retry_on", ()))
    _known(options, _METHOD_OPTIONS, "a method of an actor")
    make_options(options)
    setattr(function, _METHOD, options)
    if retry_on:
        setattr(function, RETRY_ON, retry_on)
    return function


def get_actor(name: str) -> Actor:
    """The handle of the actor that was created with this `name`.

    Blocks for a moment; in a coroutine use `await asyncio.to_thread(rtml.get_actor, name)`.

    Raises:
        LookupError: there is none (any more, or yet).
        TypeError: `name` is no text.
    """
    from rtml.client.api import client

    return actor_at(client(), name)


def actor_at(here: Client, name: str) -> Actor:
    """As `get_actor`, at this client's engine."""
    if not isinstance(name, str):
        raise TypeError(f"the name of an actor is text, not {name!r}")
    found = msgspec.json.decode(here.query("actor", name), type=_Found | None)
    if found is None:
        raise LookupError(f"there is no actor named {name!r}")
    return _rebuild(here.handle(found.id), found.name, found.methods, found.concurrent)


def stop(actor: Actor) -> Future[None]:
    """End an actor after all calls that were submitted so far; later ones fail with `ActorDied`.

    Returns:
        A future of its end. (It need not be waited for.)
    """
    ref, name, _, concurrent = _parts(actor)
    stops = Options(cpu=0.0, retries=_ALWAYS)
    return ActorMethod(ref, f"{name}.stop", STOP, stops, concurrent=concurrent).submit()


def kill(actor: Actor) -> None:
    """End an actor and its process at once. Calls that have not ended fail with `ActorDied`, and no restart follows."""
    ref = _parts(actor)[0]
    client = ref.future._client
    with client.lock:
        client.core.end(ref.future.id)
    client.driver.flush()


def ended(actor: Actor) -> Future[None]:
    """The future of an actor's end: None once it was stopped, else `ActorDied` with the reason."""
    future: Future[None] = _parts(actor)[0].future
    return future


def _parts(actor: Actor) -> Any:
    if not isinstance(actor, Actor):
        raise TypeError(f"expected an actor's handle, got {type(actor).__name__}")
    return actor.__dict__["_rtml"]


class _Creation:
    """The task creates an actor."""

    __slots__ = ("_options",)

    def __init__(self, options: ActorOptions) -> None:
        self._options = options

    def prepare(self, client: Client, task: Task) -> None:
        task.actor, task.hosts = task.id, self._options
        client.core.keep(task.id)


class _Found(msgspec.Struct):
    """The answer to `Query` "actor"."""

    id: int
    name: str
    methods: dict[str, Options]
    concurrent: bool = False


def _own_ref(future: Future[Any]) -> ActorRef:
    """For the creator of an actor."""
    client = future._client
    ref = ActorRef(future, Lease(client, "unwatch", future.id))
    client._actors[future.id] = ref
    return ref


def _rebuild(future: Future[Any], name: str, methods: dict[str, Options], concurrent: bool = False) -> Actor:
    """A handle that arrived here."""
    client = future._client
    with client.lock:
        ref = client._actors.get(future.id)
        if ref is None:
            held = None
            if future.id in client._pending:
                # The future of one of our own actors stays with us until the actor ends; what holds it must not.
                held, future._held = future._held, None
            ref = client._actors[future.id] = ActorRef(future, held)
    return Actor(ref, name, methods, concurrent)


def _decorate(cls: Any, options: dict[str, Any]) -> ActorClass[..., Any]:
    if isinstance(cls, ActorClass):
        return cls.options(**options)
    if not isinstance(cls, type):
        raise SubmitError(f"@rtml.actor decorates classes, not {type(cls).__name__}; functions are tasks: @rtml.task")
    return ActorClass(cls, options)


def _known(options: dict[str, Any], known: frozenset[str], what: str) -> None:
    unknown = sorted(set(options) - known)
    if unknown:
        raise SubmitError(f"unknown option {unknown[0]!r} of {what}; there are {', '.join(sorted(known))}")


def _split(cls: Any, values: dict[str, Any]) -> tuple[Options, ActorOptions]:
    """The options of the task that creates the actor, and those of the actor."""
    _known(values, _CLASS_OPTIONS | _ACTOR_OPTIONS, "an actor class")
    if values.get("lifetime") not in {None, "detached"}:
        raise SubmitError(f"lifetime is 'detached' or nothing, not {values['lifetime']!r}")
    restarts = _amount(values, "max_restarts", 0, least=-1)
    retries = _amount(values, "max_task_retries", 0, least=-1)
    concurrency = _amount(values, "concurrency", _ASYNC_CONCURRENCY if _is_async(cls) else 1, least=1)
    seconds = values.get("checkpoint_seconds") or 0.0
    if not isinstance(seconds, int | float) or not seconds >= 0:
        raise SubmitError(f"checkpoint_seconds is a number of seconds, not {seconds!r}")
    calls = _amount(values, "checkpoint_calls", 0, least=0)
    if (calls or seconds) and not (hasattr(cls, "__rtml_save__") and hasattr(cls, "__rtml_restore__")):
        raise SubmitError(f"checkpoints of {cls.__qualname__} need its methods __rtml_save__ and __rtml_restore__")
    asked = {name: values[name] for name in _CLASS_OPTIONS if name in values}
    options = make_options({"cpu": 0.0, **asked, "retries": _ALWAYS if restarts < 0 else restarts})
    name = values.get("name") or ""
    if not isinstance(name, str):
        raise SubmitError(f"the name of an actor is text, not {name!r}")
    make_options({"name": name})
    methods = _methods(cls, _ALWAYS if retries < 0 else retries)
    return options, ActorOptions(name, concurrency, calls, float(seconds), True, methods)


def _amount(values: dict[str, Any], name: str, default: int, least: int) -> int:
    value = values.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SubmitError(f"option {name} is a whole number from {least} on, not {value!r}")
    return value


def _methods(cls: Any, retries: int) -> dict[str, Options]:
    """The options of each method's calls."""
    found = {}
    for name, member in inspect.getmembers(cls, callable):
        if name.startswith("__") and name != "__call__":
            continue
        if name == "__call__" and "__call__" not in {key for base in cls.__mro__ for key in vars(base)}:
            continue
        found[name] = make_options({"cpu": 0.0, "retries": retries, **getattr(member, _METHOD, {})})
    return found


def _is_async(cls: Any) -> bool:
    """Whether some method is a coroutine."""
    return any(codec.is_async(member) for _, member in inspect.getmembers(cls, inspect.isfunction))


__all__ = ["Actor", "ActorClass", "ActorDied", "actor", "get_actor", "kill", "method", "stop"]
