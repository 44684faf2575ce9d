"""Generators behind the gateway: server-sent events, one for each item; a client that goes away ends the generator."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.engine import eventually
from tests.integration.test_serve import APP, Server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server("serve", APP)
    yield server
    server.stop()


def test_each_item_is_an_event(server: Server) -> None:
    status, content, headers = server.post("/v1/count", {"to": 3})
    assert status == 200
    assert headers.get_content_type() == "text/event-stream"
    assert content == b"".join(b'data: {"number":%d}\n\n' % number for number in range(3))
    assert server.post("/v1/words", {"text": "one two"})[1] == b'data: "one"\n\ndata: "two"\n\n'
    assert server.post("/v1/count", {"to": 0})[:2] == (200, b"")


def test_what_goes_wrong_first_has_a_status_and_later_an_event(server: Server) -> None:
    assert server.post("/v1/count", {"to": "many"})[0] == 400
    status, content, _ = server.post("/v1/count", {"to": 1, "gone": "fail"})
    assert status == 200
    first, second = content.decode().strip().split("\n\n")
    assert first == 'data: {"number":0}'
    assert second.startswith("event: error\ndata: {")
    assert server.post("/v1/count", {"to": 100, "pause": 1}, x_rtml_deadline_ms="50")[0] in (503, 504)


def test_a_generator_is_a_model_with_several_answers(server: Server) -> None:
    path = "/v2/models/count/generate_stream"
    status, content, headers = server.post(path, {"to": 3})
    assert (status, headers.get_content_type()) == (200, "text/event-stream")
    texts = [json.loads(event[6:])["text_output"] for event in content.decode().split("\n\n")[:-1]]
    assert texts == [f'{{"number":{number}}}' for number in range(3)]
    assert b'"text_output":"two"' in server.post("/v2/models/words/generate_stream", {"text": "one two"})[1]
    status, content, _ = server.post(path, {"to": 1, "gone": "fail"})
    assert (status, content.count(b"data: ")) == (200, 2)
    assert json.loads(content.split(b"data: ")[2]) == {"error": "as asked", "type": "LookupError"}
    assert server.post(path, {"to": 100, "pause": 1, "timeout": 50_000})[0] in (503, 504)
    assert server.post("/v2/models/count/generate", {"to": 1})[0] == 200
    status, content, _ = server.post("/v2/models/count/generate", {"to": 2})
    assert (status, "generate_stream" in content["error"]) == (400, True)


def test_the_first_event_comes_early_and_a_client_that_goes_ends_the_generator(server: Server, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    body = json.dumps({"to": 1_000_000, "pause": 0.01, "gone": str(gone)})
    connection.request("POST", "/v1/count", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.readline() == b'data: {"number":0}\n'
    response.close()
    connection.close()
    assert eventually(gone.exists)
