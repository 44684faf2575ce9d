"""What a model did, in the metrics that Triton has: dashboards and autoscalers made for it go on working.

They say nothing that `rtml_gateway_*` and the protocol's statistics do not say; counters are sums of microseconds, as
there. Requests that failed are counted for a name, not for a version, as a refused request has none.
"""

from __future__ import annotations

from typing import Final

from rtml.metrics import GatewayMetrics
from rtml.serving.registry import ModelVersion
from rtml.serving.statistics import ModelStatistics

_MICRO: Final = 1e6


def show_aliases(metrics: GatewayMetrics, model: ModelVersion) -> None:
    """Bring the aliases of one version of a model up to date."""
    of = (model.name, model.version)
    statistics = ModelStatistics()
    statistics.merge(model.statistics)
    steps = statistics.steps
    metrics.nv_success.labels(*of).value = steps["success"].count
    for reason, count in model.target.failures().items():
        metrics.nv_failure.labels(*of, reason).value = count
    metrics.nv_count.labels(*of).value = statistics.rows
    metrics.nv_executions.labels(*of).value = round(statistics.executions)
    metrics.nv_pending.labels(*of).value = model.target.in_flight.value
    metrics.nv_request.labels(*of).value = round((steps["success"].seconds + steps["fail"].seconds) * _MICRO)
    metrics.nv_queue.labels(*of).value = round(steps["queue"].seconds * _MICRO)
    metrics.nv_input.labels(*of).value = round(steps["compute_input"].seconds * _MICRO)
    metrics.nv_infer.labels(*of).value = round(steps["compute_infer"].seconds * _MICRO)
    metrics.nv_output.labels(*of).value = round(steps["compute_output"].seconds * _MICRO)
