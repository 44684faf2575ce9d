"""Large JSON, read and written in a process beside the gateway's: no parser lets others run while it works.

A thread would not do: it holds the interpreter's lock for as long as one call of the parser takes, which is 7 ms for a
MiB of numbers (and as long again for the objects that become an array). What goes to and fro are bytes and the
elements of arrays; system calls move them, without the lock. The process begins with the first large body, has one
thread of the gateway to talk to it, and ends with the gateway.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import msgspec
import numpy as np

import rtml
from rtml.errors import InvalidInput
from rtml.serving import generate, oip
from rtml.serving.app import TensorSpec
from rtml.serving.bodies import Buffer
from rtml.serving.tensors import Array

#: Bytes of JSON from which on it is read elsewhere: less takes at most two milliseconds, and this way some 0.3.
READ_ASIDE: Final = 256 * 1024
#: Bytes of arrays that would become JSON: a number is four to eight of them, and some twenty as text.
WRITE_ASIDE: Final = 64 * 1024

#: The protocol's requests, or those of its generate extension.
Form = Literal["infer", "generate"]

_HEAD: Final = struct.Struct("<IQ")
_PARTS_MAX: Final = 256
_BLOCK: Final = 1 << 20


class _Tensor(msgspec.Struct, array_like=True):
    """An array: its elements follow, or are texts."""

    name: str
    dtype: str
    shape: list[int]
    texts: list[bytes] | None = None


class _Read(msgspec.Struct, array_like=True, tag=1):
    form: Form
    header_length: int | None
    specs: list[TensorSpec]


class _Was(msgspec.Struct, array_like=True, tag=2):
    """A request as it was read."""

    id: str
    tensors: list[_Tensor]
    parameters: dict[str, Any]
    outputs: list[oip.RequestOutput] | None
    binary: bool


class _Write(msgspec.Struct, array_like=True, tag=3):
    form: Form
    model: str
    version: str
    tensors: list[_Tensor]
    specs: list[TensorSpec]
    told: dict[str, Any] | None
    labels: dict[str, list[str]]
    request: _Was


class _Written(msgspec.Struct, array_like=True, tag=4):
    """What follows: the JSON, then the data of binary tensors."""

    sizes: list[int]


class _Refused(msgspec.Struct, array_like=True, tag=5):
    """What `InvalidInput` says; or another error: then the caller is to find out itself."""

    message: str
    invalid: bool


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Read | _Was | _Write | _Written | _Refused).decode


class Unfit(Exception):
    """The other process cannot do this: do it here."""


def worth_writing(reply: oip.Reply, request: oip.Request) -> bool:
    """Whether so much of a reply becomes JSON that it should be written aside, where that is possible."""
    if request.binary and not request.outputs:
        return False
    large = [name for name, array in reply.outputs.items() if array.nbytes >= WRITE_ASIDE]
    if not large:
        return False
    asked = {output.name: output.parameters or {} for output in request.outputs or ()}
    if any(oip.REGION in parameters for parameters in asked.values()):
        return False
    if any(array.dtype.kind not in "biuf" for array in reply.outputs.values()):
        return False
    return any(
        asked.get(name, {}).get("binary_data", request.binary) is False for name in large if not asked or name in asked
    )


class Aside:
    """The hand on the other process. Everything but the exchange belongs to the gateway's event loop."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    async def read(
        self, form: Form, body: Buffer, header_length: int | None, specs: Sequence[TensorSpec]
    ) -> oip.Request:
        """What `oip.decode_request` (or `generate.decode`) makes of a body.

        Raises:
            InvalidInput: as those.
            Unfit: it must be read here.
        """
        asked = _Read(form, header_length, list(specs))
        answer, data = await self._exchange(asked, [body])
        if not isinstance(answer, _Was):
            raise Unfit
        inputs = _arrays(answer.tensors, data)
        return oip.Request(answer.id, inputs, answer.parameters, answer.outputs, answer.binary)

    async def write(self, form: Form, reply: oip.Reply, request: oip.Request) -> tuple[Buffer, list[Buffer]]:
        """What `oip.encode_reply` (or `generate.encode`) makes of a reply, for which `worth_writing` was true.

        Raises:
            InvalidInput: as those.
            Unfit: it must be written here.
        """
        tensors, parts = _described(reply.outputs)
        was = _Was(request.id, [], {}, request.outputs, request.binary)
        labels = {name: list(names) for name, names in reply.labels.items()}
        specs = list(reply.specs)
        asked = _Write(form, reply.model, reply.version, tensors, specs, reply.parameters, labels, was)
        answer, data = await self._exchange(asked, parts)
        if not isinstance(answer, _Written):
            raise Unfit
        found: list[Buffer] = []
        for size in answer.sizes:
            found.append(data[:size])
            data = data[size:]
        return found[0], found[1:]

    async def _exchange(self, asked: Any, parts: Sequence[Buffer]) -> tuple[Any, memoryview]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="rtml-aside")
        try:
            told, data = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._talk, _encode(asked), parts
            )
        except OSError as error:  # the process has died, of this body perhaps: the next one gets another
            raise Unfit(str(error)) from None
        answer = _decode(told)
        if isinstance(answer, _Refused):
            if answer.invalid:
                raise InvalidInput(answer.message)
            raise Unfit(answer.message)
        return answer, data

    def _talk(self, head: bytes, parts: Sequence[Buffer]) -> tuple[bytes, memoryview]:
        """In the thread."""
        if self._socket is None:
            self._start()
        assert self._socket is not None
        try:
            _send(self._socket, head, parts)
            return _receive(self._socket)
        except OSError:
            self._end()
            raise

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno())]
            environment = dict(os.environ)
            package = str(Path(rtml.__file__).parents[1])
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment, process_group=0
            )
        self._socket = ours

    def _end(self) -> None:
        if self._socket is not None:
            self._socket.close()  # which it notices
            self._socket = None
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    async def close(self) -> None:
        """End the process. What is being read or written has ended."""
        if self._threads is not None:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._end)
            self._threads.shutdown(wait=False)
            self._threads = None


def _described(arrays: dict[str, Array]) -> tuple[list[_Tensor], list[Buffer]]:
    """Arrays as headers, and their elements."""
    tensors: list[_Tensor] = []
    parts: list[Buffer] = []
    for name, array in arrays.items():
        if array.dtype.kind == "O":
            tensors.append(_Tensor(name, "O", list(array.shape), array.ravel().tolist()))
        else:
            tensors.append(_Tensor(name, array.dtype.str, list(array.shape)))
            parts.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return tensors, parts


def _arrays(tensors: Sequence[_Tensor], data: memoryview) -> dict[str, Array]:
    """The opposite."""
    found: dict[str, Array] = {}
    for tensor in tensors:
        if tensor.texts is not None:
            texts: Array = np.empty(len(tensor.texts), object)
            texts[:] = tensor.texts
            found[tensor.name] = texts.reshape(tensor.shape)
            continue
        dtype = np.dtype(tensor.dtype)
        size = dtype.itemsize * int(np.prod(tensor.shape, dtype=np.int64))
        found[tensor.name] = np.frombuffer(data[:size], dtype).reshape(tensor.shape)
        data = data[size:]
    return found


# --- bytes ------------------------------------------------------------------------------------------------------------


def _send(to: socket.socket, head: bytes, parts: Sequence[Buffer]) -> None:
    size = sum(len(part) for part in parts)
    left = [memoryview(part) for part in (_HEAD.pack(len(head), size), head, *parts) if len(part)]
    while left:
        sent = to.sendmsg(left[:_PARTS_MAX])
        while left and sent >= len(left[0]):
            sent -= len(left.pop(0))
        if sent:
            left[0] = left[0][sent:]


def _receive(source: socket.socket) -> tuple[bytes, memoryview]:
    head_size, size = _HEAD.unpack(_exactly(source, _HEAD.size))
    return bytes(_exactly(source, head_size)), _exactly(source, size)


def _exactly(source: socket.socket, size: int) -> memoryview:
    # Not zeroed, unlike a bytearray.
    whole: memoryview = np.empty(size, np.uint8).data
    position = 0
    while position < size:
        got = source.recv_into(whole[position : position + _BLOCK])
        if not got:
            raise ConnectionResetError("the process that reads JSON has ended")
        position += got
    return whole


# --- the other process ------------------------------------------------------------------------------------------------


def _answer(asked: Any, data: memoryview) -> tuple[Any, list[Buffer]]:
    try:
        specs = asked.specs
        if isinstance(asked, _Read):
            if asked.form == "infer":
                request = oip.decode_request(data, asked.header_length, specs)
            else:
                request = generate.decode(data, specs)
            tensors, parts = _described(request.inputs)
            return _Was(request.id, tensors, request.parameters, request.outputs, request.binary), parts
        outputs = _arrays(asked.tensors, data)
        reply = oip.Reply(asked.model, asked.version, outputs, specs, asked.told, asked.labels)
        was = oip.Request(asked.request.id, {}, {}, asked.request.outputs, asked.request.binary)
        found: list[Buffer]
        if asked.form == "infer":
            head, binary = oip.encode_reply(reply, was)
            found = [head, *binary]
        else:
            found = [generate.encode(reply, was)]
        return _Written([len(part) for part in found]), found
    except InvalidInput as error:
        return _Refused(str(error), invalid=type(error) is InvalidInput), []
    except Exception as error:  # noqa: BLE001 - whatever it is, the gateway finds out itself
        return _Refused(f"{type(error).__name__}: {error}", invalid=False), []


def _serve(fd: int) -> NoReturn:
    """Answer until the gateway is gone."""
    with socket.socket(fileno=fd) as link:
        while True:
            try:
                head, data = _receive(link)
                answer, parts = _answer(_decode(head), data)
                _send(link, _encode(answer), parts)
            except (ConnectionError, OSError):
                os._exit(0)
            del data, parts, answer


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
