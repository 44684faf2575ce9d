"""The messages of the gRPC services, made from `protos/messages.binpb`.

They live in a descriptor pool of their own, not in protobuf's default one: an application may well import Triton's or
KServe's client into the same process, which register the same names there, and two definitions of one name are an
error. For the same reason there is no generated code, which also would demand one version of protobuf: the compiled
descriptors work with every version. `make proto` compiles them.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Final, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

INFERENCE: Final = "inference.GRPCInferenceService"
HEALTH: Final = "grpc.health.v1.Health"

#: A message of a class that is made at run time; mypy cannot know its fields.
Message = Any


class Method(NamedTuple):
    """One call of a service."""

    name: str
    request: Message
    response: Message
    streams_requests: bool
    streams_responses: bool


def _load() -> descriptor_pool.DescriptorPool:
    found = descriptor_pool.DescriptorPool()
    compiled = files("rtml.serving").joinpath("protos/messages.binpb").read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(compiled).file:
        found.Add(file)
    return found


pool: Final = _load()


def message(name: str) -> Message:
    """The class of the message called `name` in full: "inference.ModelInferRequest"."""
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


def methods(service: str) -> list[Method]:
    """The calls of the service called `service` in full."""
    return [
        Method(
            method.name,
            message(method.input_type.full_name),
            message(method.output_type.full_name),
            method.client_streaming,
            method.server_streaming,
        )
        for method in pool.FindServiceByName(service).methods
    ]
