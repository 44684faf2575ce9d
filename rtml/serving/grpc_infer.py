"""gRPC's two calls that run models: `ModelInfer`, and `ModelStreamInfer` with many requests in one call.

A stream answers its requests in their order, and runs several of them at once: it reads ahead, so that they can share
batches, but no further than `_AHEAD`, so that a client that sends without reading is held back. What goes wrong with
one request is said in its answer's `error_message`; the stream goes on. Every answer says in the parameter
`triton_final_response` whether it is its request's last. A model with several answers to a request (decoupled, in
Triton's words) sends them as they come, between those of other requests, whose `id` tells them apart; and then, if the
request asks for it with `triton_enable_empty_final_response`, one that has nothing but that parameter.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from rtml.serving import grpc_codec, grpc_wire, http, oip
from rtml.serving.grpc_calls import Call, Calls, counted
from rtml.serving.grpc_codec import InferResponse, Received
from rtml.serving.grpc_messages import message
from rtml.serving.inference import Inference, Progress
from rtml.serving.registry import ModelVersion, Registry

_StreamResponse: Final = message("inference.ModelStreamInferResponse")

#: Requests of one stream that run or wait to be answered.
_AHEAD: Final = 64
#: HTTP's status for who brings no token, or none that is known.
_UNKNOWN_CLIENT: Final = 401
_FINAL: Final = "triton_final_response"
_EMPTY_FINAL: Final = "triton_enable_empty_final_response"

#: The serialised answer of one request; None: it has been given already.
_Answer = asyncio.Future[bytes | None]


class _Stream:
    """One call of `ModelStreamInfer`.

    Args:
        context: Of grpc.
    """

    def __init__(self, context: Any) -> None:
        self._context = context
        self._writing = asyncio.Lock()
        #: The answers that are given in order; None is the end.
        self.waiting: asyncio.Queue[_Answer | None] = asyncio.Queue(_AHEAD)
        self.running = asyncio.Semaphore(_AHEAD)

    async def write(self, answer: bytes) -> None:
        """Send an answer; whoever writes waits until the client has taken what was sent before."""
        async with self._writing:
            await self._context.write(answer)


class InferCalls:
    """Runs the models of a registry.

    Args:
        calls: Those that run.
        registry: What is served.
        inference: Runs it.
        regions: Memory shared with clients, if that is allowed.
    """

    def __init__(
        self, calls: Calls, registry: Registry, inference: Inference, regions: oip.Regions | None = None
    ) -> None:
        self._regions = regions
        self._calls = calls
        self._registry = registry
        self._inference = inference

    # --- one request --------------------------------------------------------------------------------------------------

    async def infer(self, data: bytes, context: Any) -> bytes:
        """`ModelInfer`: a serialised request in, a serialised response out."""

        async def handle(call: Call) -> bytes:
            received = Received(data)
            with self._calls.request(call, _path(received), len(data)) as visit:
                model = self._find(received)
                progress = call.progress(model.deadline)
                with counted(model.target, progress, visit):
                    request = grpc_codec.decode_request(received, model.inputs, self._regions)
                    reply = await self._inference.run(model, request, progress)
                    response, raw = grpc_codec.encode_reply(reply, request, self._regions)
                context.set_trailing_metadata(call.trailing(visit, progress))
            return grpc_wire.join(response.SerializeToString(), raw)

        return await self._calls.answer("ModelInfer", context, handle)

    def _find(self, received: Received) -> ModelVersion:
        sent = received.message
        return self._registry.find(sent.model_name, sent.model_version or None)

    # --- many ---------------------------------------------------------------------------------------------------------

    async def stream(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """`ModelStreamInfer`."""

        async def handle(call: Call) -> None:
            stream = _Stream(context)
            try:
                async with asyncio.TaskGroup() as group:
                    reader = group.create_task(self._read(requests, call, stream, group))
                    with self._calls.reading(reader):
                        while (answer := await stream.waiting.get()) is not None:
                            if (data := await answer) is not None:
                                await stream.write(data)
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            if self._calls.draining:
                raise http.HttpError(503, "the gateway stops and reads no more of this stream", "Stopping")
            context.set_trailing_metadata(((http.REQUEST_ID, call.id),))

        await self._calls.answer("ModelStreamInfer", context, handle)

    async def _read(
        self, requests: AsyncIterator[bytes], call: Call, stream: _Stream, group: asyncio.TaskGroup
    ) -> None:
        """Start the requests of a stream as they come, until its end or the gateway's."""
        loop = asyncio.get_running_loop()
        try:
            async for data in requests:
                answer: _Answer = loop.create_future()
                await stream.running.acquire()
                task = group.create_task(self._answer(data, call, stream, answer))
                task.add_done_callback(lambda _: stream.running.release())
                await stream.waiting.put(answer)
        except asyncio.CancelledError:
            if not self._calls.draining:
                raise
        await stream.waiting.put(None)

    async def _answer(self, data: bytes, call: Call, stream: _Stream, answer: _Answer) -> None:
        """All answers to one request of a stream; an error is one, too."""
        sent = None
        at_once = False
        request_id = self._calls.ids.new()
        try:
            received = Received(data)
            sent = received.message
            with self._calls.request(call, _path(received), len(data)) as visit:
                model = self._find(received)
                progress = call.progress(model.deadline, request_id)
                with counted(model.target, progress, visit):
                    request = grpc_codec.decode_request(received, model.inputs, self._regions)
                    empty_final = request.parameters.pop(_EMPTY_FINAL, False)
                    if not model.decoupled:
                        reply = await self._inference.run(model, request, progress)
                        _settle(answer, self._stream_response(reply, request, final=True))
                        return
                    at_once = True
                    _settle(answer, None)
                    await self._run(model, request, progress, stream.write)
            if empty_final:
                # Nobody knows of an answer that it is the last before the model has ended: the end is one of its own.
                final = InferResponse(model_name=model.name, model_version=model.version, id=request.id)
                final.parameters[_FINAL].bool_param = True
                await stream.write(grpc_wire.stream_response(final.SerializeToString()))
        except Exception as error:
            http.log_error("ModelStreamInfer", request_id, error)
            failure = http.explain(error)
            if failure.status == _UNKNOWN_CLIENT:
                raise  # nobody who brings no token gets further answers
            response = _StreamResponse(error_message=failure.message)
            if sent is not None:
                response.infer_response.model_name = sent.model_name
                response.infer_response.model_version = sent.model_version
                response.infer_response.id = sent.id
            response.infer_response.parameters[_FINAL].bool_param = True
            if at_once:
                await stream.write(response.SerializeToString())
            else:
                _settle(answer, response.SerializeToString())

    async def _run(
        self, model: ModelVersion, request: oip.Request, progress: Progress, write: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """Answer with what a decoupled model gives, as it comes."""
        async with contextlib.aclosing(self._inference.stream(model, request, progress)) as replies:
            async for reply in replies:
                await write(self._stream_response(reply, request, final=False))

    def _stream_response(self, reply: oip.Reply, request: oip.Request, *, final: bool) -> bytes:
        response, raw = grpc_codec.encode_reply(reply, request, self._regions)
        response.parameters[_FINAL].bool_param = final
        return grpc_wire.stream_response(grpc_wire.join(response.SerializeToString(), raw))


def _settle(answer: _Answer, data: bytes | None) -> None:
    if not answer.cancelled():  # with the call, a moment ago
        answer.set_result(data)


def _path(received: Received) -> str:
    """What HTTP calls the request."""
    return f"/v2/models/{received.message.model_name}/infer"
