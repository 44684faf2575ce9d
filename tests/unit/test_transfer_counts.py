"""What a data endpoint counts, and how the dispatcher shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from rtml.metrics import DispatcherMetrics
from rtml.segment import HEADER_OFFSET
from rtml.transfer.counts import Counts, read
from tests.unit.test_transfer import MIB, Host, content, eventually, hosts

__all__ = ["hosts"]


def test_counts_outlive_the_process_but_not_what_was_on_its_way(tmp_path: Path) -> None:
    assert read(str(tmp_path)) == {}
    first = Counts(str(tmp_path))
    first.arrived(10)
    first.left(1 << 40)
    first.began()
    first.began()
    first.ended(True)
    first.source_failed(True)
    first.close()
    first.arrived(1000)  # seen by nobody
    second = Counts(str(tmp_path))
    second.arrived(5)
    second.source_failed(False)
    assert read(str(tmp_path)) == {
        "bytes_in": 15, "bytes_out": 1 << 40, "in_flight": 0, "pulled": 1, "failed": 0, "resumed": 1, "refused": 1
    }  # fmt: skip
    second.close()


def test_a_transfer_is_shown_on_both_sides(hosts: Callable[..., Host]) -> None:
    here, there = hosts("here"), hosts("there")
    ref = here.store(1).put([content(MIB)])
    there.store(11).get(ref)
    size = ref.size - HEADER_OFFSET
    eventually(lambda: read(here.directory)["bytes_out"] == size)
    shown = []
    for host in (here, there):
        metrics = DispatcherMetrics()
        metrics.observe_transfers(read(host.directory))
        samples = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(metrics.render())
            for sample in family.samples
        }
        shown.append({key: value for key, value in samples.items() if key[0].startswith("rtml_object") and value})
    assert shown == [
        {("rtml_object_bytes_total", "out"): size},
        {("rtml_object_bytes_total", "in"): size, ("rtml_object_transfers_total", "ok"): 1},
    ]
