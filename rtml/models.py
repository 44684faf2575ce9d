"""ONNX models as tasks: ``classify = rtml.model("classifier.onnx", batch=8)``, then ``classify.submit(array)``.

Only the description of a model travels: its path (or its bytes) and a few settings. Each executor that gets such a
task opens the model once (`__rtml_load__`), warms it up, and keeps it. With `batch`, calls whose arrays agree in
everything but the first dimension run as one; the dispatcher decides which (see D5 in ARCHITECTURE.md), this module
joins and splits the arrays. A call that fails does not fail those that share its batch.

Threads: onnxruntime would start one per core in every executor, and idle ones spin. Here a model runs in the
executor's main thread alone unless asked otherwise, so that as many executors as there are cores do not fight for
them.

(The module is not called `rtml.model`: importing it would hide the function of that name.)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rtml.client.functions import RETRY_ON, RemoteFunction, task
from rtml.errors import InvalidInput, RowsDepend
from rtml.onnxfile import ModelInfo, TensorInfo, describe

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]

_log = logging.getLogger(__name__)

#: Tried in this order, as far as the executor's onnxruntime has them.
_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")

#: `TensorProto.BFLOAT16`.
_ONNX_BFLOAT16 = 16

#: Whether to run once before the first call, and on what shapes.
Warmup = bool | Sequence[int] | Mapping[str, Sequence[int]]


class Settings(NamedTuple):
    """How executors run a model; see `model` for what each means."""

    name: str
    batched: bool = False
    outputs: tuple[str, ...] | None = None
    warmup: bool | tuple[dict[str, tuple[int, ...]], ...] = True
    threads: int = 1
    providers: tuple[str, ...] | None = None
    after: Callable[[Any], Any] | None = None
    #: Refuse a model whose rows cannot be joined.
    check_rows: bool = False


class Model:
    """A model that can be called: arrays in, arrays out. Opened at the first call, or by `__rtml_load__`.

    Args:
        source: The path of an ONNX file as the executors see it, or its content.
        settings: How to run it.
    """

    #: Read by `codec.describe_function`: a call with four rows fills four places of a batch.
    __rtml_rows__ = True

    def __init__(self, source: str | bytes, settings: Settings) -> None:
        self._source = source
        self._settings = settings
        # What a task is called in logs and metrics.
        self.__name__ = self.__qualname__ = settings.name
        self._session: Any = None
        self._info: ModelInfo | None = None
        #: Some input or output is of that type.
        self._bfloat16 = False
        #: Names of the outputs.
        self._outputs: list[str] = []
        #: Of a model with one input: its name, and class, type and shape of arrays that it can be run on as they are.
        self._only: tuple[str, Any, np.dtype[Any], tuple[int, ...]] | None = None
        #: The shape of the last such array, which fitted.
        self._before: tuple[int, ...] | None = None
        #: `run` of onnxruntime's own session.
        self._run: Any = None

    def __repr__(self) -> str:
        source = self._source if isinstance(self._source, str) else f"{len(self._source)} bytes"
        return f"<Model {self._settings.name!r} of {source}>"

    def __reduce__(self) -> tuple[Any, ...]:
        kept = {name: value for name, value in vars(self).items() if name == RETRY_ON}
        return Model, (self._source, self._settings), kept or None

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Run the model.

        In a batch every argument is a list with one entry per call, and so is the result; an entry that is an
        exception is that call's error.

        Returns:
            The array, if the model has one output, else a dict of arrays by name; what `after` made of it, if given.

        Raises:
            InvalidInput: an input is missing or unknown, or its type or shape does not fit.
            RuntimeError: onnxruntime could not run the model on these inputs.
        """
        if self._session is None:
            self.__rtml_load__()
        if len(args) == 1 and not inputs and self._only is not None:
            # Most calls are of this kind, and take a third of the time that the others do before they run.
            name, kind, dtype, shape = self._only
            value = args[0]
            known = value.__class__ is kind and value.dtype == dtype
            if known and (value.shape == self._before or _fits(shape, value.shape)):
                self._before = value.shape
                return self._run_one(name, value)
        given = self._named(args, inputs)
        if self._settings.batched and all(isinstance(value, list) for value in given.values()):
            return self._run_calls(given)
        (result,) = self._run_group([self._checked(given)])
        return _raised(result)

    def __rtml_load__(self) -> None:
        """Open the model and run it once. Executors call this before the first task.

        Raises:
            RuntimeError: onnxruntime is missing, or refuses the model or the warm-up shape that was asked for.
            RowsDepend: that was to be checked.
        """
        if self._session is not None:
            return
        session = self._open()
        self._session, self._info = session, self._described(session)
        self._bfloat16 = any(tensor.dtype == "bfloat16" for tensor in (*self._info.inputs, *self._info.outputs))
        self._outputs = [output.name for output in self._info.outputs]
        self._only = _only(self._info)
        self._run = _runner(session)
        self._warm_up()
        if self._settings.check_rows:
            self._check_rows()

    def metadata(self) -> ModelInfo:
        """The model's inputs, outputs and properties, read from the file without loading the model.

        Raises:
            OSError: the file is not on this machine.
            ValueError: this is no ONNX model.
        """
        if self._info is None:
            info = describe(self._source)
            wanted = self._settings.outputs
            if wanted is not None:
                by_name = {output.name: output for output in info.outputs}
                info = info._replace(outputs=tuple(by_name[name] for name in wanted if name in by_name))
            self._info = info
        return self._info

    def _open(self) -> Any:
        try:
            import onnxruntime
        except ImportError as missing:
            raise RuntimeError("running ONNX models needs onnxruntime: pip install 'rtml[onnx]'") from missing
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._settings.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are raised
        # A waiting thread that spins takes the core from another executor.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        available = onnxruntime.get_available_providers()
        providers = self._settings.providers or [name for name in _PROVIDERS if name in available]
        absent = [name for name in providers if name not in available]
        if absent:
            raise ValueError(f"{self} asks for {absent[0]}, but onnxruntime offers {', '.join(available)} here")
        try:
            return onnxruntime.InferenceSession(self._source, options, providers=providers)
        except Exception as error:  # noqa: BLE001  # onnxruntime's exceptions exist only where it is installed
            raise RuntimeError(f"cannot open {self!r}: {error}") from None

    def _described(self, session: Any) -> ModelInfo:
        info = self.metadata()
        known = {node.name for node in session.get_outputs()}
        unknown = [name for name in self._settings.outputs or () if name not in known]
        if unknown:
            raise RuntimeError(f"{self!r} has no outputs {unknown}; it has {sorted(known)}")
        return info

    def _warm_up(self) -> None:
        warmup = self._settings.warmup
        if warmup is False:
            return
        for asked in ({},) if warmup is True else warmup:
            self._warm_up_once(asked)

    def _warm_up_once(self, asked: dict[str, tuple[int, ...]]) -> None:
        import numpy as np

        feed: dict[str, Array] = {}
        for tensor in self.metadata().inputs:
            shape = asked.get(tensor.name)
            if shape is None:
                shape = tuple(1 if size < 0 else size for size in tensor.shape or ())
            dtype = _numpy_dtype(tensor)
            if dtype is None:
                return
            feed[tensor.name] = np.full(shape, "", dtype) if dtype == np.dtype(object) else np.zeros(shape, dtype)
        result = self.run_feed(feed)
        if isinstance(result, Exception):
            if asked:
                raise RuntimeError(f"{self!r} does not run on its warm-up shape: {result}")
            # Without a given shape, ones stand for what the file leaves open, and not every model takes such an input.
            _log.debug("%r does not warm up on %s: %s", self, {k: v.shape for k, v in feed.items()}, result)

    def _check_rows(self) -> None:
        from rtml import rows

        reason = rows.dependence(self.metadata().inputs, self.run_feed)
        if reason:
            self._session = None
            raise RowsDepend(f"calls of model {self._settings.name!r} cannot share a run: {reason}")

    def _named(self, args: tuple[Any, ...], inputs: dict[str, Any]) -> dict[str, Any]:
        names = [tensor.name for tensor in self.metadata().inputs]
        if len(args) > len(names):
            raise InvalidInput(f"model {self._settings.name!r} takes {len(names)} inputs {names}, not {len(args)}")
        given = dict(zip(names, args, strict=False))
        double = given.keys() & inputs.keys()
        given |= inputs
        missing = [name for name in names if name not in given]
        unknown = [name for name in given if name not in names]
        if double or missing or unknown:
            said = ((double, "given twice"), (missing, "missing"), (unknown, "unknown"))
            what = ", ".join(f"{', '.join(sorted(which))} {word}" for which, word in said if which)
            raise InvalidInput(f"model {self._settings.name!r} takes the inputs {', '.join(names)}: {what}")
        return given

    def _checked(self, given: Mapping[str, Any]) -> dict[str, Array]:
        return {tensor.name: self._checked_input(tensor, given[tensor.name]) for tensor in self.metadata().inputs}

    def _checked_input(self, tensor: TensorInfo, value: Any) -> Array:
        import numpy as np

        try:
            array = np.asarray(value)
        except Exception as error:  # noqa: BLE001  # ragged lists, and whatever an object's __array__ may raise
            raise InvalidInput(f"{self._where(tensor)} takes an array: {error}") from None
        want = _numpy_dtype(tensor)
        if want is not None and array.dtype != want:
            # Python's and numpy's wider defaults are meant; a float where a whole number belongs is a mistake.
            if not np.can_cast(array.dtype, want, "same_kind"):
                raise InvalidInput(f"{self._where(tensor)} takes {want}, not {array.dtype}")
            with np.errstate(over="ignore"):  # infinite, as in every other conversion
                array = array.astype(want)
        shape = tensor.shape
        if shape is not None and not _fits(shape, array.shape):
            raise InvalidInput(f"{self._where(tensor)} has the shape {_shown(shape)}, not {_shown(array.shape)}")
        if array.dtype.kind == "O" and not all(isinstance(element, str) for element in array.flat):
            # onnxruntime would take str(element) for the text.
            others = [type(element).__name__ for element in array.flat if not isinstance(element, str | bytes)]
            if others:
                raise InvalidInput(f"{self._where(tensor)} takes text, not {others[0]}")
            try:
                texts = [element.decode() if isinstance(element, bytes) else element for element in array.flat]
            except UnicodeDecodeError:
                raise InvalidInput(f"{self._where(tensor)} takes text, and these bytes are not UTF-8") from None
            array = np.array(texts, object).reshape(array.shape)
        return array

    def _where(self, tensor: TensorInfo) -> str:
        return f"input {tensor.name!r} of model {self._settings.name!r}"

    def _run_calls(self, given: dict[str, list[Any]]) -> list[Any]:
        """The results of a batch of calls; those that fit together run together."""
        calls = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
        results: list[Any] = [None] * len(calls)
        feeds: dict[int, dict[str, Array]] = {}
        groups: dict[Any, list[int]] = {}
        for index, call in enumerate(calls):
            try:
                feeds[index] = feed = self._checked(call)
            except InvalidInput as error:
                results[index] = error
                continue
            key = tuple(array.shape[1:] for array in feed.values()) if self._joins(feed) else index
            groups.setdefault(key, []).append(index)
        for indices in groups.values():
            for index, result in zip(indices, self._run_group([feeds[i] for i in indices]), strict=True):
                results[index] = result
        return results

    def _joins(self, feed: dict[str, Array]) -> bool:
        """Whether this call can share a run: every input counts the same rows in a first dimension of any size."""
        return (
            all(tensor.shape is None or tensor.shape[:1] == (-1,) for tensor in self.metadata().inputs)
            and all(array.ndim > 0 for array in feed.values())
            and len({len(array) for array in feed.values()}) == 1
        )

    def _run_group(self, feeds: list[dict[str, Array]]) -> list[Any]:
        """The results of calls that fit together: from one run, or if that fails, each from its own."""
        if len(feeds) == 1:
            return [self._finish(self.run_feed(feeds[0]))]
        import numpy as np

        joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
        rows = [len(next(iter(feed.values()))) for feed in feeds]
        outputs = self.run_feed(joined)
        if not isinstance(outputs, Exception) and _has_rows(outputs, sum(rows)):
            value = self._finish(outputs)
            if not isinstance(value, Exception) and _has_rows(value, sum(rows)):
                return _split(value, rows)
        return [self._finish(self.run_feed(feed)) for feed in feeds]

    def run_feed(self, feed: dict[str, Array]) -> dict[str, Array] | Exception:
        """The outputs of one run by name, or why there are none: for those who have checked and joined the inputs."""
        names = self._outputs
        run = self._run_values if self._bfloat16 else self._session.run
        try:
            return dict(zip(names, run(names, feed), strict=True))
        except Exception as error:  # noqa: BLE001  # onnxruntime's exceptions cannot be carried to where it is missing
            return self._failed(feed, error)

    def _failed(self, feed: dict[str, Array], error: Exception) -> RuntimeError:
        shapes = ", ".join(f"{name} {_shown(array.shape)}" for name, array in feed.items())
        return RuntimeError(f"model {self._settings.name!r} failed on {shapes}: {error}")

    def _run_one(self, name: str, value: Array) -> Any:
        """What a call gets of a model with one input, for an array that it can be run on."""
        if self._run is None or self._bfloat16:
            return _raised(self._finish(self.run_feed({name: value})))
        try:
            found = self._run(self._outputs, {name: value}, None)
        except Exception as error:  # noqa: BLE001  # as in `run_feed`
            raise self._failed({name: value}, error) from None
        if len(found) == 1 and self._settings.after is None:
            return found[0]
        return _raised(self._finish(dict(zip(self._outputs, found, strict=True))))

    def _run_values(self, names: list[str], feed: dict[str, Array]) -> list[Array]:
        """`session.run` for models with bfloat16, which onnxruntime does not exchange with numpy."""
        from onnxruntime import OrtValue

        from rtml import bfloat16

        values = {}
        for tensor in self.metadata().inputs:
            array = feed[tensor.name]
            if tensor.dtype == "bfloat16":
                bits = bfloat16.narrow(array)
                values[tensor.name] = OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_BFLOAT16)
            else:
                values[tensor.name] = OrtValue.ortvalue_from_numpy(array)
        found = self._session.run_with_ort_values(names, values)
        return [_from_value(value) for value in found]

    def _finish(self, outputs: dict[str, Array] | Exception) -> Any:
        """What callers get of a run's outputs."""
        if isinstance(outputs, Exception):
            return outputs
        value = next(iter(outputs.values())) if len(outputs) == 1 else outputs
        if self._settings.after is None:
            return value
        try:
            return self._settings.after(value)
        except Exception as error:  # noqa: BLE001  # user code; its error belongs to the call, not to its batch-mates
            return error


class ModelFunction(RemoteFunction[..., Any]):
    """What `model` returns: a remote function that knows its inputs and outputs. Called directly, it runs here."""

    def metadata(self) -> ModelInfo:
        """The model's inputs, outputs and properties, read from the file without loading the model.

        Raises:
            OSError: the file is not on this machine.
            ValueError: this is no ONNX model.
        """
        info: ModelInfo = self.__wrapped__.metadata()  # type: ignore[attr-defined]  # set by functools.update_wrapper
        return info

    def options(self, **changes: Any) -> ModelFunction:
        """The same model with other options for its calls: deadline, priority, timeout, ...

        Raises:
            SubmitError: an option is unknown or makes no sense.
        """
        other = super().options(**changes)
        changed = ModelFunction(other.function, other.defaults, other.overrides)
        changed._described = other._described
        return changed


def model(  # noqa: PLR0913  # all but the first by keyword, all with defaults
    source: str | os.PathLike[str] | bytes,
    *,
    batch: int = 0,
    batch_delay: float = 0.0,
    name: str | None = None,
    outputs: Sequence[str] | None = None,
    warmup: Warmup | Sequence[Mapping[str, Sequence[int]]] = True,
    threads: int = 1,
    providers: Sequence[str] | None = None,
    after: Callable[[Any], Any] | None = None,
    check_rows: bool = False,
    **options: Any,
) -> ModelFunction:
    """An ONNX model as a remote function: ``m.submit(array)`` or ``m.submit(ids=a, mask=b)``.

    Args:
        source: The path of an ONNX file (which the executors must be able to read), or its content.
        batch: Most rows (of the first dimension, over all calls) of one run; 0: each call runs alone.
        batch_delay: Seconds that a run may wait to become fuller; 0 takes what is there.
        name: What it is called in metrics and logs; the file's name without it.
        outputs: The outputs to compute, in this order; all of them without it.
        warmup: Run once on zeros when an executor opens the model; a shape (or shapes by input name) says of what
            size, else dimensions that the file leaves open are 1. A list of shapes by name: once each. False: don't.
        threads: Threads within one run. More than one makes executors compete for cores.
        providers: onnxruntime's execution providers in order of preference; without it CUDA where there is one, else
            the CPU.
        after: Applied in the executor to the outputs of a whole run (one array, or a dict of arrays by name), so that
            less has to travel. It returns arrays with the same first dimension, or a list with one entry per row.
        check_rows: When an executor opens the model, see on made-up rows whether an output's row depends on the rows
            beside it, so that calls could not share a run; then every call fails with `RowsDepend`.
        **options: As in `rtml.task`: cpu, gpu, memory, resources, retries, timeout, priority, ...

    Raises:
        ValueError: a negative `batch`, or no threads.
    """
    if batch < 0 or threads < 1:
        raise ValueError(f"batch must be 0 or more and threads 1 or more, not {batch} and {threads}")
    content = source if isinstance(source, bytes) else os.path.abspath(os.fspath(source))
    if name is None:
        name = "model" if isinstance(content, bytes) else os.path.splitext(os.path.basename(content))[0]
    settings = Settings(
        name,
        batch > 0,
        None if outputs is None else tuple(outputs),
        _warmup_shapes(warmup, content),
        threads,
        None if providers is None else tuple(providers),
        after,
        check_rows,
    )
    if batch:
        options |= {"batch": batch, "batch_delay": batch_delay}
    remote = task(**options, name=name)(Model(content, settings))
    return ModelFunction(remote.function, remote.defaults)


def _warmup_shapes(
    warmup: Warmup | Sequence[Mapping[str, Sequence[int]]], source: str | bytes
) -> bool | tuple[dict[str, tuple[int, ...]], ...]:
    if isinstance(warmup, bool):
        return warmup
    if isinstance(warmup, Mapping):
        return ({name: tuple(shape) for name, shape in warmup.items()},)
    if warmup and isinstance(warmup[0], Mapping):
        return tuple({name: tuple(shape) for name, shape in sample.items()} for sample in warmup)  # type: ignore[union-attr]
    inputs = describe(source).inputs
    if len(inputs) != 1:
        raise ValueError(f"the model has inputs {[i.name for i in inputs]}: give warm-up shapes by name")
    return ({inputs[0].name: tuple(warmup)},)  # type: ignore[arg-type]  # numbers


def _raised(result: Any) -> Any:
    """What a call returns; raises what it raises."""
    if isinstance(result, Exception):
        raise result
    return result


def _only(info: ModelInfo) -> tuple[str, Any, np.dtype[Any], tuple[int, ...]] | None:
    """See `Model._only`; None where there are several inputs, or where arrays have to be looked into."""
    import numpy as np

    if len(info.inputs) != 1:
        return None
    (tensor,) = info.inputs
    dtype = _numpy_dtype(tensor)
    if dtype is None or dtype.kind == "O" or tensor.shape is None:
        return None
    return tensor.name, np.ndarray, dtype, tensor.shape


def _runner(session: Any) -> Any:
    """`run` without onnxruntime's checks, a tenth of a small call, of inputs that were checked here; None: no such.

    With other providers than its own those checks belong to the way in which it falls back to another one.
    """
    inner = getattr(session, "_sess", None)
    return getattr(inner, "run", None) if session.get_providers() == ["CPUExecutionProvider"] else None


def _fits(shape: Sequence[int], found: Sequence[int]) -> bool:
    """Whether a shape is the expected one, in which -1 is any size."""
    if len(shape) != len(found):
        return False
    for asked, size in zip(shape, found, strict=True):  # noqa: SIM110 - half the time of `all`
        if asked not in (-1, size):
            return False
    return True


def _numpy_dtype(tensor: TensorInfo) -> np.dtype[Any] | None:
    """The type of arrays for this input; None where numpy has none (then onnxruntime is the judge)."""
    import numpy as np

    if tensor.dtype == "bfloat16":
        return np.dtype("float32")
    return np.dtype(tensor.dtype) if tensor.dtype else None


def _from_value(value: Any) -> Array:
    """A copy of what is in an `OrtValue` in this machine's memory; bfloat16 as float32."""
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    import ctypes
    import math

    import numpy as np

    from rtml import bfloat16

    shape = value.shape()
    size = 2 * math.prod(shape)
    bits = np.frombuffer(ctypes.string_at(value.data_ptr(), size) if size else b"", np.uint16)
    return bfloat16.widen(bits).reshape(shape)


def _has_rows(value: Any, rows: int) -> bool:
    """Whether a value of a joint run can be split among its calls."""
    parts = value.values() if isinstance(value, dict) else (value,)
    return all(hasattr(part, "__len__") and len(part) == rows for part in parts)


def _split(value: Any, rows: list[int]) -> list[Any]:
    """The part of each call, which has `rows[i]` rows of the value of a joint run."""
    ends = [sum(rows[: index + 1]) for index in range(len(rows))]
    places = [slice(end - count, end) for end, count in zip(ends, rows, strict=True)]
    if isinstance(value, dict):
        return [{name: part[place] for name, part in value.items()} for place in places]
    return [value[place] for place in places]


def _shown(shape: Sequence[int] | None) -> str:
    return "?" if shape is None else f"[{', '.join('any' if size < 0 else str(size) for size in shape)}]"
