"""`rtml.metrics`: what is counted arrives in the exposition, and the exposition is one that Prometheus can read."""

import gc
from typing import Any

import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from rtml import messages, metrics
from rtml.graph.tables import Ended


def samples(text: str) -> dict[str, float]:
    return {
        sample.name + "".join(f",{key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_request_is_counted_by_status_and_time() -> None:
    gateway = metrics.GatewayMetrics()
    target = gateway.target("ocr", "/v1/read")
    target.ended(200, 0.0002, None)
    target.ended(200, 0.004, 0.003)
    target.ended(504, 0.01, 0.01)
    target.ended(499, 0.001, 0.01)
    target.ended(500, 0.001, 0.01)
    target.ended(503, 0.001, 0.01)
    target.ended(200, 0.001, 0.01, True)
    found = samples(gateway.render())
    labels = ",app=ocr,model=/v1/read"
    assert found["rtml_gateway_requests_total,app=ocr,code=200,model=/v1/read,protocol=http"] == 3
    assert found["rtml_gateway_request_seconds_count" + labels] == 7
    assert found["rtml_gateway_request_seconds_bucket,app=ocr,le=0.00025,model=/v1/read"] == 1
    assert found["rtml_gateway_request_seconds_sum" + labels] == pytest.approx(0.0182)
    deadlines = {
        outcome: found[f"rtml_gateway_deadlines_total,app=ocr,model=/v1/read,outcome={outcome}"]
        for outcome in metrics.DEADLINE_OUTCOMES
    }
    assert deadlines == {
        "met": 0, "partial": 1, "missed": 2, "shed_admission": 1, "cancelled": 1, "failed": 1
    }  # fmt: skip
    assert found["rtml_gateway_deadline_slack_seconds_bucket,app=ocr,le=-0.001,model=/v1/read"] == 1


def ended(**changes: Any) -> Ended:
    """A task that waited 0.9 ms in a queue and ran 20 ms, 20.1 ms after it was handed over."""
    usual = Ended(
        task=2, parent=0, graph=2, function="f", outcome=messages.OK, attempts=1, submitted=10.0, ready=10.0,
        assigned=10.0009, finished=10.021, run=0.02, worker=1, batch=1, trace="", slack=None,
    )  # fmt: skip
    return replace(usual, **changes)


def test_a_task_is_counted_by_function_and_outcome() -> None:
    dispatcher = metrics.DispatcherMetrics()
    meter = dispatcher.meter("detect")
    assert dispatcher.meter("detect") is meter
    meter.count([ended(batch=3, attempts=2, slack=0.1, ending="met", error=-0.002), ended(slack=-0.1, ending="missed")])
    late = ended(outcome=messages.EXPIRED, ready=0.0, assigned=0.0, slack=0.0, ending="expired_queue")
    meter.count([ended(slack=-0.1, parent=1), late])
    found = samples(dispatcher.render())
    assert found["rtml_tasks_total,function=detect,outcome=ok"] == 3
    assert found["rtml_tasks_total,function=detect,outcome=expired"] == 1
    assert found["rtml_task_attempts_total,function=detect"] == 4
    assert found["rtml_task_batch_calls_bucket,function=detect,le=2.0"] == 2
    assert found["rtml_task_queue_seconds_bucket,function=detect,le=0.001"] == 3
    assert found["rtml_task_queue_seconds_bucket,function=detect,le=0.0005"] == 0
    assert found["rtml_task_seconds_sum,function=detect"] == pytest.approx(3 * 0.021)
    assert found["rtml_deadline_total,function=detect,outcome=met"] == 1
    assert found["rtml_deadline_total,function=detect,outcome=missed"] == 1
    assert found["rtml_deadline_total,function=detect,outcome=expired_queue"] == 1
    assert found["rtml_predicted_minus_actual_seconds_bucket,function=detect,le=-0.001"] == 1
    assert found["rtml_dispatcher_cpu_seconds_total"] > 0


def test_functions_beyond_the_limit_share_their_counters() -> None:
    dispatcher = metrics.DispatcherMetrics()
    for number in range(3 * metrics.FUNCTIONS_MAX):
        dispatcher.meter(f"f{number}").count([ended()])
    found = samples(dispatcher.render())
    assert sum(value for name, value in found.items() if name.startswith("rtml_tasks_total")) == (
        3 * metrics.FUNCTIONS_MAX
    )
    assert found["rtml_tasks_total,function=(other),outcome=ok"] == 2 * metrics.FUNCTIONS_MAX


def test_a_family_beyond_its_limit_shares_one_child() -> None:
    counter = metrics.Counter("c", "A counter.", ("x",))
    for number in range(metrics.CHILDREN_MAX + 5):
        counter.labels(str(number)).value += 1
    assert counter.labels("new").value == 5
    with pytest.raises(ValueError, match="labels"):
        counter.labels("a", "b")


def test_gateway_and_dispatcher_share_no_name() -> None:
    texts = metrics.GatewayMetrics().render() + metrics.DispatcherMetrics().render()
    declared = [line.split()[2] for line in texts.splitlines() if line.startswith("# TYPE")]
    assert len(declared) == len(set(declared))
    assert all(name.startswith("rtml_") for name in declared)


def test_pauses_of_the_garbage_collector_are_seen() -> None:
    gateway = metrics.GatewayMetrics()
    pauses = gateway.gc_pause.labels()
    stop = gateway.watch_gc(pauses)
    gc.collect()
    stop()
    seen = sum(pauses.counts)
    assert seen >= 1
    gc.collect()
    assert sum(pauses.counts) == seen
