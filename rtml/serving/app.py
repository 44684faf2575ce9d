"""`App`: the names under which models and graph programs are served.

An app only records. It knows neither HTTP nor the engine, so that importing an application (every executor does, to
find its functions) costs nothing; `rtml.serving.gateway` reads the records.

    app = App("ocr", title="Page reader")
    app.model("detector", detector)                  # POST /v2/models/detector/infer, and the rest of the protocol

    @app.endpoint("/v1/read")                        # POST /v1/read
    @rtml.task
    async def read(image: bytes) -> Page: ...
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from rtml.serving.sequencespec import SequenceSpec

_Program = TypeVar("_Program", bound=Callable[..., Any])

#: What an endpoint's path may be; these prefixes are the gateway's own.
_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_RESERVED = ("/v2", "/metrics", "/healthz", "/readyz", "/openapi.json", "/docs")
#: A model's name is a path segment, a metric label and a file name.
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class TensorSpec(NamedTuple):
    """What a model takes or gives under one name, as the Open Inference Protocol describes it."""

    name: str
    #: An Open Inference Protocol datatype: "FP32", "INT64", "BYTES", ...
    datatype: str
    #: -1 is a dimension of any size; None: even their number is open.
    shape: tuple[int, ...] | None
    #: A request may leave it out.
    optional: bool = False


class ServedModel(NamedTuple):
    """A model of an app: tensors in, tensors out."""

    name: str
    #: A remote function that takes its inputs by name and returns an array (one output) or a dict of arrays.
    function: Any
    #: None: ask the model itself (`rtml.model` knows them from the ONNX file).
    inputs: tuple[TensorSpec, ...] | None
    outputs: tuple[TensorSpec, ...] | None
    version: str
    deadline: float | None
    #: Of a model that keeps state.
    sequence: SequenceSpec | None = None


class Endpoint(NamedTuple):
    """A graph program of an app: typed input, one result."""

    path: str
    function: Any
    #: Seconds that a request has when it brings no deadline of its own; None: no deadline.
    deadline: float | None
    #: Its name as a model of the Open Inference Protocol; "": made from the path.
    model: str = ""


class App:
    """What one application serves. Give it to the gateway: `rtml serve module:app`.

    Args:
        name: Shown in metrics, logs and `GET /v2`; a name like "ocr".
        title: One line for people.
        version: The application's own version, for people.
    """

    def __init__(self, name: str, *, title: str = "", version: str = "") -> None:
        self.name = name
        self.title = title
        self.version = version
        self.models: dict[str, ServedModel] = {}
        self.endpoints: dict[str, Endpoint] = {}

    def model(
        self,
        name: str,
        function: _Program,
        *,
        inputs: Sequence[TensorSpec] | None = None,
        outputs: Sequence[TensorSpec] | None = None,
        version: str = "1",
        deadline: float | None = None,
        sequence: SequenceSpec | None = None,
    ) -> _Program:
        """Serve `function` as the Open Inference Protocol model `name`.

        Args:
            name: The model's name in paths: letters, digits, ".", "_" and "-".
            function: What `rtml.model` returned, or any remote function of numpy arrays. With one input it is called
                with the array alone, with several by the inputs' names.
            inputs: Names, datatypes and shapes; needed unless the function knows its `metadata()`.
            outputs: The same for what it returns.
            version: The version under which it is served.
            deadline: Seconds that a request has when it brings no deadline of its own.
            sequence: Which of its tensors are state, see `rtml.serving.sequencespec`; for what `rtml.model` returned.

        Returns:
            `function`, unchanged.

        Raises:
            ValueError: the name is taken or cannot stand in a path, or the deadline is not positive.
        """
        if not _MODEL_NAME.fullmatch(name):
            raise ValueError(f"model name {name!r}: letters, digits, '.', '_' and '-' only")
        if name in self.models:
            raise ValueError(f"app {self.name!r} has a model {name!r} already")
        _check_deadline(deadline)
        self.models[name] = ServedModel(
            name,
            _remote(function),
            None if inputs is None else tuple(inputs),
            None if outputs is None else tuple(outputs),
            version,
            deadline,
            sequence,
        )
        return function

    def endpoint(self, path: str, *, deadline: float | None = None, model: str = "") -> Callable[[_Program], _Program]:
        """Serve a graph program under `POST path`: ``@app.endpoint("/v1/read")`` above ``@rtml.task``.

        The program's annotations say what a request must look like: a parameter annotated `bytes` or `numpy.ndarray`
        receives the raw body (an image, say) of a request that is not JSON; other parameters come from the JSON
        object in the body, or beside a raw body from the query string. A single parameter that is a `msgspec.Struct`,
        dataclass or `TypedDict` takes the whole JSON body. Requests that do not fit are refused with what is wrong.

        Args:
            path: An absolute path without variables.
            deadline: Seconds that a request has when it brings no deadline of its own.
            model: The program's name as a model of the Open Inference Protocol, which it is as well; by default the
                last part of the path.

        Returns:
            A decorator that returns the program (a plain function becomes a remote function first).

        Raises:
            ValueError: the path is malformed, taken, or the gateway's own.
        """
        if not _PATH.fullmatch(path):
            raise ValueError(f"endpoint path {path!r} must look like '/v1/read'")
        if any(path == prefix or path.startswith(prefix + "/") for prefix in _RESERVED):
            raise ValueError(f"endpoint path {path!r} is the gateway's own; its prefixes are {', '.join(_RESERVED)}")
        if path in self.endpoints:
            raise ValueError(f"app {self.name!r} has an endpoint {path!r} already")
        if model and not _MODEL_NAME.fullmatch(model):
            raise ValueError(f"model name {model!r}: letters, digits, '.', '_' and '-' only")
        _check_deadline(deadline)

        def add(program: _Program) -> _Program:
            function = _remote(program)
            self.endpoints[path] = Endpoint(path, function, deadline, model)
            return function  # type: ignore[no-any-return]  # stands in for the program under its name

        return add


def _remote(function: Any) -> Any:
    """`function` as a remote function."""
    if hasattr(function, "submit"):
        return function
    if not callable(function):
        raise TypeError(f"{function!r} is neither a remote function (rtml.task, rtml.model) nor a function")
    import rtml  # here: `rtml.serving` must not pull in the client before someone needs it

    return rtml.task(function)


def _check_deadline(deadline: float | None) -> None:
    if deadline is not None and deadline <= 0:
        raise ValueError(f"deadline must be a positive number of seconds, not {deadline!r}")
