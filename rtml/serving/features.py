"""What of the Open Inference Protocol is switched on."""

from __future__ import annotations

from typing import Final, NamedTuple

from rtml.errors import InvalidInput

#: Of `GET /v2`: the extensions that are always there.
_ALWAYS: Final = (
    "classification",
    "sequence",
    "binary_tensor_data",
    "parameters",
    "model_configuration",
    "schedule_policy",
    "statistics",
    "generate",
)


class NotEnabled(InvalidInput):
    """A request wants what the operator has not allowed; the message says how to."""

    http_status = 501


class Features(NamedTuple):
    """What an operator has allowed; everything here gives clients a hold on the gateway's machine."""

    #: Tensors in POSIX shared memory that clients have made.
    shared_memory: bool = False
    #: Traces of requests, written to `trace_file`.
    trace: bool = False
    trace_file: str = "rtml-trace.json"
    #: What the gateway logs.
    logging: bool = False
    #: Model files in requests to load a model.
    model_upload: bool = False

    def extensions(self, repository: bool) -> list[str]:
        """Of `GET /v2`.

        Args:
            repository: Whether models can be loaded and unloaded.
        """
        found = list(_ALWAYS)
        if repository:
            found += ["model_repository", "model_repository(unload_dependents)"]
        if self.shared_memory:
            found.append("system_shared_memory")
        if self.trace:
            found.append("trace")
        if self.logging:
            found.append("logging")
        return found
