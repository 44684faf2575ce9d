"""Deadlines over HTTP with a real engine: what is refused, what is missing, what a reply says of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.engine import eventually
from tests.integration.test_serve import Server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server("serve", "tests.integration.deadline_app:app", "--limit", "tenant_graphs_max=6")
    yield found
    found.stop()


def test_what_cannot_make_it_is_refused_at_once(server: Server) -> None:
    for _ in range(5):
        assert server.post("/v1/nap", {"seconds": 0.2})[0] == 200
    held = [threading.Thread(target=server.post, args=("/v1/nap", {"seconds": 0.3})) for _ in range(5)]
    for thread in held:
        thread.start()
    status = 200
    body: Any = {}
    headers: Any = {}
    for _ in range(20):
        status, body, headers = server.post("/v1/nap", {"seconds": 0.2}, x_rtml_deadline_ms="100")
        if status == 503:
            break
    for thread in held:
        thread.join()
    assert (status, body["type"]) == (503, "Overloaded")
    assert body["predicted"] > 0.1 > body["retry_after"] / 10
    assert body["budget"] == pytest.approx(0.1, abs=0.05)
    assert body["quota"] is False
    assert int(headers["Retry-After"]) >= 1
    assert server.metric('rtml_deadline_total{function="naps",outcome="shed_admission"}') >= 1
    shed = 'rtml_gateway_deadlines_total{app="deadlines",model="/v1/nap",outcome="shed_admission"}'
    assert server.metric(shed) >= 1


def test_too_many_at_a_time_are_refused_without_a_deadline_too(server: Server) -> None:
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(server.post("/v1/nap", {"seconds": 0.3})[0])) for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(answers)) == [200, 503]
    assert answers.count(200) >= 6


def test_at_the_deadline_the_answer_names_what_was_missing(server: Server) -> None:
    answers: list[tuple[int, Any]] = []

    def late() -> bool:
        answers.append(server.post("/v1/nap", {"seconds": 30}, x_rtml_deadline_ms="900")[:2])
        status, body = answers[-1]
        return status == 504 and body["missing"] != ["naps"]

    # What it took so far may be longer than the budget: then it is refused, until a probe is let in. And where the
    # engine has no time to say what was missing, the gateway answers itself and knows of no steps.
    assert eventually(late), answers[-1]
    _, body = answers[-1]
    assert (body["type"], body["missing"]) == ("DeadlineExceeded", ["nap"])
    eventually(lambda: server.metric("rtml_wasted_compute_seconds_total") > 0)


def test_an_answer_without_some_steps_says_which(server: Server) -> None:
    status, body, headers = server.post("/v1/some", {})
    assert (status, body) == (200, [0.001, None])
    assert headers["x-rtml-missing-steps"] == "step%20with%2C%20comma"


def test_a_reply_of_the_protocol_says_how_the_deadline_went(server: Server) -> None:
    request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}
    status, body, _ = server.post("/v2/models/double/infer", request)
    assert status == 200, body
    assert body["parameters"] == {"missing_steps": "step with, comma"}
    request["parameters"] = {"timeout": 5_000_000}  # type: ignore[assignment]
    status, body, _ = server.post("/v2/models/double/infer", request)
    assert body["parameters"] == {"deadline_outcome": "partial", "missing_steps": "step with, comma"}
    assert server.metric('rtml_deadline_total{function="double",outcome="partial"}') == 1
