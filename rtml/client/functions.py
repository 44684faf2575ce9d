"""Remote functions: what `@rtml.task` makes of a function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Generic, ParamSpec, TypeVar, overload

import msgspec

from rtml import codec
from rtml.client.context import current_client
from rtml.errors import SubmitError
from rtml.messages import Alternative, Function, Options

if TYPE_CHECKING:
    from rtml.client.client import Client
    from rtml.client.future import Future
    from rtml.client.streams import Stream

P = ParamSpec("P")
R = TypeVar("R")

#: Attribute of a plain function with the exception types that it may be retried on, read by executors.
RETRY_ON: Final = "__rtml_retry_on__"

_OPTIONS: Final = frozenset(Options.__struct_fields__)
_TEXTS: Final = frozenset({"name", "tenant", "latest"})
_COUNTS: Final = frozenset({"window", "memory", "retries", "priority", "batch"})
#: In the order of the fields of `Alternative`.
_RESOURCES: Final = ("cpu", "gpu", "memory", "resources")
#: Characters of a name among the options.
_TEXT_MAX: Final = 1000
_SECONDS: Final = frozenset({"timeout", "deadline", "batch_delay", "max_age"})


class RemoteFunction(Generic[P, R]):
    """A function that can run on workers. Calling it runs it here, as if it were not decorated.

    Args:
        function: the plain function; stays reachable as `.function` and `.__wrapped__`.
        defaults: its own options, sent with its definition.
        overrides: what `.options(...)` asked for, sent with each call.
    """

    def __init__(self, function: Callable[P, Any], defaults: Options, overrides: Options | None = None) -> None:
        functools.update_wrapper(self, function)
        if (defaults.alternatives or (overrides and overrides.alternatives)) and codec.is_async(function):
            raise SubmitError(f"alternatives are for plain functions: {function.__qualname__} is async")
        self.function = function
        self.defaults = defaults
        self.overrides = overrides
        #: The definition, and the client it was made for.
        self._described: tuple[Client, Function] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Run it here, as if it were not decorated."""
        return self.function(*args, **kwargs)

    def submit(self, *args: Any, **kwargs: Any) -> Future[R]:
        """Run it on a worker, see `Client.submit`. Arguments may be futures of what the function takes."""
        client = current_client()
        if client is None or client.closed:
            from rtml.client.api import client as first_client

            client = first_client()
        return self.submit_to(client, args, kwargs)

    def stream(self, *args: Any, **kwargs: Any) -> Stream[Any]:
        """Run a generator function on a worker; gives its items as they come. See `rtml.client.streams`.

        It is not run again when its process dies, unless `retries` are given: then what was taken is left out.
        """
        from rtml.client.api import client

        return self.stream_to(client(), args, kwargs)

    def stream_to(self, client: Client, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Stream[Any]:
        """The same on a worker of this client's engine."""
        from rtml.client.streams import start

        return start(client, self._definition(client), args, kwargs, self.overrides)

    def _definition(self, client: Client) -> Function:
        described = self._described
        if described is None or described[0] is not client:
            described = self._described = (client, client.describe(self.function, self.defaults))
        return described[1]

    def submit_to(self, client: Client, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[R]:
        """Run it on a worker of this client's engine."""
        described = self._described
        function = described[1] if described is not None and described[0] is client else self._definition(client)
        return client.call(function, args, kwargs, self.overrides)

    def map(self, *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1) -> Iterator[R]:
        """Call it for each row of the iterables on the workers, see `Client.map`."""
        from rtml.client.api import client

        return client().map(self, *iterables, timeout=timeout, chunksize=chunksize)

    def options(self, **changes: Any) -> RemoteFunction[P, R]:
        """The same function with other options for its calls: cpu, timeout, deadline, priority, ...

        Raises:
            SubmitError: an option is unknown or makes no sense.
        """
        if "retry_on" in changes:
            raise SubmitError("retry_on belongs to the function: give it to @rtml.task")
        base = {} if self.overrides is None else msgspec.structs.asdict(self.overrides)
        changed = make_options({**base, **changes})
        other: RemoteFunction[P, R] = RemoteFunction(self.function, self.defaults, changed)
        other._described = self._described
        return other

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else BoundRemoteFunction(self, instance)

    def __reduce__(self) -> Any:
        if self.overrides is None and importable(self):
            return self.function.__qualname__
        return _rebuild, (self.function, self.defaults, self.overrides)

    def __repr__(self) -> str:
        return f"<rtml task {self.function.__qualname__}>"


class BoundRemoteFunction(Generic[P, R]):
    """A `@rtml.task` in a class, looked up on an instance: the instance travels as the first argument."""

    def __init__(self, remote: RemoteFunction[P, R], instance: object) -> None:
        self.remote = remote
        self.instance = instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it here, as if it were not decorated."""
        return self.remote.function(self.instance, *args, **kwargs)  # type: ignore[arg-type]

    def submit(self, *args: Any, **kwargs: Any) -> Future[R]:
        """Run it on a worker, see `Client.submit`."""
        return self.remote.submit(self.instance, *args, **kwargs)

    def map(self, *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1) -> Iterator[R]:
        """Call it for each row of the iterables on the workers, see `Client.map`."""
        from rtml.client.api import client

        function: Callable[..., Any] = self.remote.function
        call = functools.partial(function, self.instance)
        return client().map(call, *iterables, timeout=timeout, chunksize=chunksize)

    def options(self, **changes: Any) -> BoundRemoteFunction[P, R]:
        """The same with other options for its calls."""
        return BoundRemoteFunction(self.remote.options(**changes), self.instance)


@overload
def task(function: Callable[P, Coroutine[Any, Any, R]], /) -> RemoteFunction[P, R]: ...
@overload
def task(function: Callable[P, R], /) -> RemoteFunction[P, R]: ...
@overload
def task(**options: Any) -> Callable[[Callable[..., Any]], RemoteFunction[..., Any]]: ...
def task(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a function (sync or async) a remote one: `@rtml.task` or `@rtml.task(retries=2, ...)`.

    Args:
        function: the function to decorate.
        **options: `cpu`, `gpu` (fractions allowed), `memory` in bytes, `resources` (custom labels), `retries` and
            `retry_on` (exception types; the death of a worker always counts), `timeout` of one attempt in seconds,
            `deadline` of the graph in seconds, `priority`, `batch` (most items of one call: the function takes and
            returns lists), `batch_delay` in seconds, `detached`, `name`, `tenant`, `admission`, `hedge`.

    Raises:
        SubmitError: an option is unknown or makes no sense.
    """
    if function is None:
        return lambda decorated: _decorate(decorated, options)
    return _decorate(function, options)


def make_options(values: Mapping[str, Any]) -> Options:
    """Validated options.

    Raises:
        SubmitError: one is unknown, of a wrong type, or out of range; the message names it.
    """
    unknown = set(values) - _OPTIONS
    if unknown:
        raise SubmitError(f"unknown option {sorted(unknown)[0]!r}; there are {', '.join(sorted(_OPTIONS))}, retry_on")
    for name, value in values.items():
        if value is None:
            continue
        if name in _TEXTS and not isinstance(value, str):
            raise SubmitError(f"option {name} is text, not {value!r}")
        if name in _COUNTS and (not isinstance(value, int) or isinstance(value, bool)):
            raise SubmitError(f"option {name} is a whole number, not {value!r}")
        if name in _SECONDS | {"cpu", "gpu", "hedge"} and (
            not isinstance(value, int | float) or isinstance(value, bool)
        ):
            raise SubmitError(f"option {name} is a number, not {value!r}")
        if name != "priority" and isinstance(value, int | float) and not value >= 0:
            raise SubmitError(f"option {name} cannot be negative: {value!r}")
    if values.get("alternatives") is not None:
        values = {**values, "alternatives": _alternatives(values)}
    if values.get("window") == 0:
        raise SubmitError("option window is at least 1: items that the generator may be ahead of its consumer")
    if values.get("hedge") is not None and not values["hedge"] < 1:
        raise SubmitError(f"option hedge is a portion below 1, like 0.95, not {values['hedge']!r}")
    try:
        # In the order of the fields: on the wire the options are an array.
        options = msgspec.convert([values.get(name) for name in Options.__struct_fields__], Options)
    except msgspec.ValidationError as error:
        text = str(error)
        for position, name in enumerate(Options.__struct_fields__):
            text = text.replace(f"`$[{position}]", f"`{name}")
        raise SubmitError(f"wrong option: {text}") from None
    for text in (options.name or "", options.tenant or "", options.latest or "", *(options.resources or ())):
        if len(text) > _TEXT_MAX or not _encodable(text):
            raise SubmitError(f"a name among the options has at most {_TEXT_MAX} Unicode characters: {text[:50]!a}")
    return options


def _alternatives(values: Mapping[str, Any]) -> list[list[Any]]:
    """Sets of resources, best first, as they are on the wire."""
    given = values["alternatives"]
    for name in (*_RESOURCES, "batch", "hedge"):
        if values.get(name):
            raise SubmitError(f"alternatives do not go together with {name}: each names its own cpu, gpu, ...")
    if not isinstance(given, list | tuple) or not given:
        raise SubmitError(f'alternatives is a list of resources like [{{"gpu": 1}}, {{"cpu": 2}}], not {given!r}')
    found = []
    for one in given:
        if isinstance(one, Alternative):
            one = msgspec.structs.asdict(one)
        if not isinstance(one, Mapping) or set(one) - set(_RESOURCES):
            raise SubmitError(f"an alternative names some of {', '.join(_RESOURCES)}, not {one!r}")
        options = make_options(one)
        found.append([getattr(options, name) for name in _RESOURCES])
    return found


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decorate(function: Callable[..., Any], options: dict[str, Any]) -> RemoteFunction[..., Any]:
    if isinstance(function, RemoteFunction):
        raise SubmitError(f"{function!r} is a task already; use .options(...)")
    if not callable(function):
        raise SubmitError(f"@rtml.task decorates functions, not {type(function).__name__}")
    options = dict(options)
    retry_on = retry_types(options.pop("retry_on", ()))
    if retry_on:
        setattr(function, RETRY_ON, retry_on)
    return RemoteFunction(function, make_options(options))


def retry_types(retry_on: Any) -> tuple[type[BaseException], ...]:
    """The exception types of an option `retry_on`.

    Raises:
        SubmitError: it is something else.
    """
    if isinstance(retry_on, type):
        retry_on = (retry_on,)
    if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in retry_on):
        raise SubmitError("retry_on is a tuple of exception types")
    return tuple(retry_on)


def importable(remote: Any) -> bool:
    """Whether another process finds this very object by its module and name."""
    import sys

    module = getattr(remote.function, "__module__", None)
    if module is None or module == "__main__":
        return False
    found: Any = sys.modules.get(module)
    for part in remote.function.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is remote


def _rebuild(function: Callable[..., Any], defaults: Options, overrides: Options | None) -> RemoteFunction[..., Any]:
    return RemoteFunction(function, defaults, overrides)
