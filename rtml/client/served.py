"""Models by name: `rtml.served("detector")` is the model of that name which the gateway serves.

A graph that a gateway starts works with one version of each model: those that were current when it began. A call made
deep in the graph minutes later, while newer versions are served already, still reaches the same version. The gateway
gives the versions to the graph as its context (`messages.Task.context`), a definition that is sent to each process
once; here names are looked up in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NoReturn

import msgspec

from rtml.client.context import current_task
from rtml.client.functions import RemoteFunction, make_options
from rtml.errors import SubmitError
from rtml.messages import Function, Options

if TYPE_CHECKING:
    from rtml.client.client import Client
    from rtml.client.future import Future

#: Version sets whose content is remembered in this process.
_SETS_KEPT: Final = 64


class ServedVersion(msgspec.Struct, array_like=True, frozen=True):
    """One model of a version set."""

    version: str
    function: Function
    #: What its calls ask for, beside the function's own options.
    options: Options | None = None


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(dict[str, ServedVersion])
_sets: Final[dict[int, dict[str, ServedVersion]]] = {}


def encode_versions(versions: dict[str, ServedVersion]) -> bytes:
    """The content of a context's definition."""
    return _encoder.encode(versions)


def served(name: str) -> ServedFunction:
    """The model that the gateway serves under a name, as a remote function.

    Args:
        name: As in `app.model(name, ...)` or in the model repository.

    Returns:
        A remote function. Which version it calls is decided by the graph in which it is called, so it may be made once,
        at the top of a module.
    """
    return ServedFunction(name)


class ServedFunction(RemoteFunction[..., Any]):
    """What `served` returns. Its calls can only be made in graphs that a gateway has started."""

    def __init__(self, name: str, overrides: Options | None = None) -> None:
        def model(*args: Any, **kwargs: Any) -> NoReturn:
            raise SubmitError(f"model {name!r} runs in executors: call .submit(...), then await the future")

        model.__name__ = model.__qualname__ = name
        super().__init__(model, Options(), overrides)
        self.name = name

    @property
    def version(self) -> str:
        """The version that this graph works with.

        Raises:
            SubmitError: the calling code runs in no graph that a gateway started, or there is no such model.
        """
        return self._find().version

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call the model on a worker.

        Raises:
            SubmitError: as `version`.
        """
        self._find()  # before an engine is started for a program that has none
        return super().submit(*args, **kwargs)

    def submit_to(self, client: Client, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[Any]:
        """Call the model on a worker of this client's engine. Raises as `submit`."""
        found = self._find()
        function = found.function
        if not client.core.knows(function.id):
            with client.lock:
                client.core.define(function)
        options = found.options
        if options is not None and self.overrides is not None:
            given = {key: value for key, value in msgspec.structs.asdict(self.overrides).items() if value is not None}
            options = msgspec.structs.replace(options, **given)
        return client.call(function, args, kwargs, options or self.overrides)

    def options(self, **changes: Any) -> ServedFunction:
        """The same model with other options for its calls.

        Raises:
            SubmitError: an option is unknown or makes no sense.
        """
        base = {} if self.overrides is None else msgspec.structs.asdict(self.overrides)
        return ServedFunction(self.name, make_options({**base, **changes}))

    def __reduce__(self) -> Any:
        return ServedFunction, (self.name, self.overrides)

    def __repr__(self) -> str:
        return f"<rtml served model {self.name!r}>"

    def _find(self) -> ServedVersion:
        task = current_task()
        context = None if task is None else task.context
        if context is None:
            raise SubmitError(
                f"rtml.served({self.name!r}) is known only in graphs that a gateway has started, which fixes the "
                "versions of its models for them; elsewhere open the file: rtml.model(path)"
            )
        versions = _sets.get(context.id)
        if versions is None:
            assert isinstance(context.pickled, bytes)
            versions = _decoder.decode(context.pickled)
            if len(_sets) >= _SETS_KEPT:
                del _sets[next(iter(_sets))]
            _sets[context.id] = versions
        found = versions.get(self.name)
        if found is None:
            known = ", ".join(sorted(versions)) or "none"
            raise SubmitError(f"the gateway had no model {self.name!r} ready when this graph began; it had {known}")
        return found
