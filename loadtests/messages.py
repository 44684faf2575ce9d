"""Requests as bytes, made from a scenario and from what the server says of its models."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from loadtests import wire
from loadtests.scenario import Request, Scenario
from loadtests.sender import Message, Target

#: Different inputs for each kind of requests.
VARIANTS: Final = 16
_TIMEOUT: Final = 10.0
_DTYPES: Final = {
    "BOOL": "?", "INT8": "i1", "INT16": "i2", "INT32": "i4", "INT64": "i8", "UINT8": "u1", "UINT16": "u2",
    "UINT32": "u4", "UINT64": "u8", "FP16": "f2", "FP32": "f4", "FP64": "f8",
}  # fmt: skip


class Site:
    """A server: its address, and what it says of itself.

    Args:
        url: `http://HOST:PORT`, with a path before the protocol's if there is one.

    Raises:
        ValueError: that is no such url.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"the url must be like http://127.0.0.1:8000, not {url!r}")
        self.host, self.port = parts.hostname, parts.port or 80
        self.prefix = parts.path.rstrip("/")
        self.url = f"http://{self.host}:{self.port}{self.prefix}"

    def get(self, path: str) -> Any:
        """JSON of a GET.

        Raises:
            ValueError: it is not answered with 200 and JSON.
        """
        try:
            with urllib.request.urlopen(self.url + path, timeout=_TIMEOUT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ValueError(f"{self.url}{path} answers {error.code}: {error.read()[:200]!r}") from None
        except OSError as error:
            raise ValueError(f"{self.url}{path}: {error}") from None

    def post(self, message: Message, path: str = "") -> tuple[int, bytes]:
        """Status and body of one message sent as it is (`path` only says what was meant, for errors)."""
        with socket.create_connection((self.host, self.port), _TIMEOUT) as connection:
            connection.sendall(b"%b\r\n%b" % (message.head, message.body))
            data = bytearray()
            while (found := wire.response_end(data)) is None:
                chunk = connection.recv(1 << 16)
                if not chunk:
                    raise ValueError(f"{self.url}{path}: the connection was closed after {bytes(data)[:200]!r}")
                data += chunk
        return found[0], wire.body(bytes(data[: found[1]]))

    def first(self, message: Message, path: str, seconds: float, alive: Callable[[], bool]) -> bytes:
        """The body of its first answer with status 200 to a message that is sent until there is one.

        Raises:
            TimeoutError: there is none in that time, or it is not alive any more.
        """
        end = time.monotonic() + seconds
        last = "nothing listens"
        while time.monotonic() < end and alive():
            try:
                status, body = self.post(message, path)
            except (OSError, ValueError) as error:
                last = str(error)
            else:
                if status == 200:
                    return body
                last = f"{status}, {body[:200]!r}"
            time.sleep(0.1)
        raise TimeoutError(f"no answer with status 200 within {seconds:g} seconds; the last was: {last}")

    def wait(self, path: str = "/v2/health/ready", seconds: float = 60.0) -> None:
        """Until it answers a GET with 200.

        Raises:
            TimeoutError: it does not, in that time.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(self.url + path, timeout=_TIMEOUT) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                pass
            if time.monotonic() > end:
                raise TimeoutError(f"{self.url}{path} was not ready within {seconds:g} seconds")
            time.sleep(0.05)


def message(site: Site, path: str, body: bytes, headers: dict[str, str]) -> Message:
    """One request, but for the empty line (and the budget) between head and body."""
    lines = [f"POST {site.prefix}{path} HTTP/1.1", f"Host: {site.host}:{site.port}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return Message("".join(f"{line}\r\n" for line in lines).encode(), body)


def messages(site: Site, scenario: Scenario) -> list[list[Message]]:
    """For each kind of the scenario's requests its variants, the same for the same seed.

    Raises:
        ValueError: the server does not know a model, or an input's size is nowhere said.
    """
    found = []
    for number, request in enumerate(scenario.requests):
        rng = np.random.default_rng([scenario.seed, number])
        if request.path is not None:
            body = b"" if request.json is None else json.dumps(request.json).encode()
            found.append([message(site, request.path, body, {"Content-Type": "application/json"} | request.headers)])
        else:
            described = site.get(f"/v2/models/{request.model}")
            found.append([_infer(site, request, described["inputs"], rng) for _ in range(VARIANTS)])
    return found


def target(site: Site, scenario: Scenario, deadline_header: str | None = "x-rtml-deadline-ms") -> Target:
    """Where generators send the scenario.

    Raises:
        ValueError: see `messages`; or the server does not answer a request with 200.
    """
    made = messages(site, scenario)
    for request, variants in zip(scenario.requests, made):
        status, body = site.post(variants[0], request.path or f"/v2/models/{request.model}/infer")
        if status != 200:
            raise ValueError(f"a request {request.name!r} is answered with {status}: {body[:300]!r}")
    return Target(site.host, site.port, made, deadline_header, timeout=scenario.timeout)


def _infer(site: Site, request: Request, inputs: list[dict[str, Any]], rng: np.random.Generator) -> Message:
    tensors: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for one in inputs:
        name, datatype = one["name"], one["datatype"]
        shape = request.sizes.get(name) or [
            request.rows if size < 0 and place == 0 else size for place, size in enumerate(one["shape"])
        ]
        if any(size < 0 for size in shape):
            raise ValueError(f"input {name!r} of model {request.model!r} has shape {one['shape']}: give `sizes` for it")
        if datatype not in _DTYPES:
            raise ValueError(f"input {name!r} of model {request.model!r} is {datatype}; send it as `path` and `json`")
        data = values(rng, shape, datatype)
        tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
        if request.binary:
            blobs.append(data.tobytes())
            tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            tensor["data"] = data.ravel().tolist()
        tensors.append(tensor)
    document: dict[str, Any] = {"inputs": tensors}
    if request.binary:
        document["parameters"] = {"binary_data_output": True}
    head = json.dumps(document, separators=(",", ":")).encode()
    headers = {"Content-Type": "application/octet-stream" if request.binary else "application/json"}
    if request.binary:
        headers["Inference-Header-Content-Length"] = str(len(head))
    path = f"/v2/models/{request.model}/infer"
    return message(site, path, head + b"".join(blobs), headers | request.headers)


def values(rng: np.random.Generator, shape: list[int], datatype: str) -> npt.NDArray[Any]:
    """An input of small numbers, rounded so that JSON stays short."""
    dtype = np.dtype(_DTYPES[datatype])
    if dtype.kind == "f":
        return rng.normal(0, 1, shape).round(3).astype(dtype)
    return rng.integers(0, 2, shape).astype(dtype)
