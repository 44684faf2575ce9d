"""The onnx package's own test cases, served from a model repository and asked by Triton's client.

What onnxruntime computes by itself, the gateway must answer; what it cannot, or what the protocol has no name for, the
gateway must refuse with a reason.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.http as triton

from tests.conformance import nodetests
from tests.conformance.conftest import Gateway
from tests.conformance.nodetests import Case, datatype_of, same
from tests.integration.test_serve import wait_for

pytestmark = pytest.mark.slow

#: Requests at a time.
CLIENTS = 4
#: Light architectures that take milliseconds.
QUICK = ("light_shufflenet", "light_squeezenet")
#: Between onnxruntime and the package's reference; the same for both sides of the comparison.
RTOL, ATOL = 1e-3, 1e-5
#: How many cases must be answered right, of the chosen ones and of all; more is better, fewer is a loss.
ANSWERED_MIN, ANSWERED_MIN_WHOLE = 190, 1450


def chosen(cases: Iterable[Case]) -> Iterator[Case]:
    """Of each operator and each combination of datatypes one case that onnxruntime can do, and one that it cannot."""
    able: set[Any] = set()
    unable: set[Any] = set()
    for case in cases:
        kinds = tuple(getattr(getattr(value, "dtype", None), "name", "?") for value in case.inputs.values())
        keys = {kinds, *(node.op_type for node in onnx.load_from_string(case.model).graph.node)}
        if keys <= able:
            continue
        seen = able if alone(case) else unable
        if not keys <= seen:
            seen |= keys
            yield case


@pytest.fixture(scope="module")
def cases(whole: bool) -> list[Case]:
    found = [*nodetests.node_cases(), *nodetests.file_cases()]
    light = nodetests.light_cases()
    if whole:
        return [*found, *light]
    return [*chosen(found), *(case for case in light if case.name in QUICK)]


@pytest.fixture(scope="module")
def served(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """All of them in one repository."""
    directory = tmp_path_factory.mktemp("cases")
    for case in cases:
        path = directory / "models" / model_name(case) / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        path.write_bytes(case.model)
    gateway = Gateway(directory, patience=300)
    wait_for(lambda: not any(row["state"] == "LOADING" for row in index(gateway).values()), 900)
    yield gateway
    gateway.stop()


def model_name(case: Case) -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", case.name)


def index(gateway: Gateway) -> dict[str, Any]:
    return {row["name"]: row for row in gateway.post("/v2/repository/index")[1]}


class Outcome:
    """What became of a case: "right", "refused", "failed" or "wrong", and why."""

    def __init__(self, case: Case, kind: str, why: str = "") -> None:
        self.case = case
        self.kind = kind
        self.why = why


def ask(gateway: Gateway, state: dict[str, Any], case: Case) -> Outcome:
    """One request, as Triton's client writes it."""
    row = state.get(model_name(case), {"state": "missing", "reason": ""})
    if row["state"] != "READY":
        return Outcome(case, "refused", row["reason"])
    inputs = []
    for name, array in case.inputs.items():
        if not hasattr(array, "dtype") or not datatype_of(array):
            return Outcome(case, "wrong", f"it is served, but input {name!r} has no datatype")
        tensor = triton.InferInput(name, list(array.shape), datatype_of(array))
        inputs.append(tensor.set_data_from_numpy(np.asarray(array, object) if array.dtype.kind in "US" else array))
    body, size = triton.InferenceServerClient.generate_request_body(inputs)
    connection = HTTPConnection("127.0.0.1", gateway.port, timeout=60)
    try:
        headers = {} if size is None else {"Inference-Header-Content-Length": str(size)}
        connection.request("POST", f"/v2/models/{model_name(case)}/infer", body, headers)
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    if response.status != 200:
        return Outcome(case, "failed", f"{response.status}: {json.loads(content)['error']}")
    length = response.headers["Inference-Header-Content-Length"]
    result = triton.InferenceServerClient.parse_response_body(content, header_length=length and int(length))
    for name, expected in case.outputs.items():
        found = result.as_numpy(name)
        if found is None or not same(found, expected, max(case.rtol, RTOL), max(case.atol, ATOL)):
            return Outcome(case, "wrong", f"output {name!r} is {found}, not {expected}"[:500])
    return Outcome(case, "right")


def alone(case: Case) -> bool:
    """Whether onnxruntime, without anything else, gives the expected outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(case.model, options, providers=["CPUExecutionProvider"])
        found = session.run(list(case.outputs), case.inputs)
    except Exception:
        return False  # whatever it does not like
    return all(
        same(array, expected, max(case.rtol, RTOL), max(case.atol, ATOL))
        for array, expected in zip(found, case.outputs.values(), strict=True)
    )


def test_the_packages_cases(cases: list[Case], served: Gateway, whole: bool) -> None:
    state = index(served)
    with ThreadPoolExecutor(CLIENTS) as pool:
        outcomes = list(pool.map(lambda case: ask(served, state, case), cases))
    by_kind = collections.Counter(outcome.kind for outcome in outcomes)
    print(f"{len(cases)} cases: {dict(by_kind)}")
    unexplained = [o.case.name for o in outcomes if o.kind == "refused" and not o.why.strip()]
    assert not unexplained, "refused without a reason"
    bare = [f"{o.case.name}: {o.why}" for o in outcomes if "Traceback" in o.why or "/tmp" in o.why]
    assert not bare, "clients are told no places"
    ours = [f"{o.case.name}: {o.kind}: {o.why}" for o in outcomes if o.kind != "right" and alone(o.case)]
    assert not ours, "onnxruntime alone can do these:\n" + "\n".join(ours)
    assert by_kind["right"] >= (ANSWERED_MIN_WHOLE if whole else ANSWERED_MIN), by_kind
    for outcome in outcomes:
        if outcome.kind != "right":
            print(f"{outcome.kind} {outcome.case.name}: {outcome.why[:300]}")
