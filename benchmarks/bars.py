"""What rtml must reach, row by row, and which rows are better when larger."""

from __future__ import annotations

from dataclasses import dataclass

Table = dict[str, dict[str, float | None]]


def larger_is_better(row: str) -> bool:
    """Rates; everything else is a time or an amount."""
    return row.endswith(("_per_s", " /s"))


@dataclass(frozen=True)
class Bar:
    """`row` must be at most `limit`, or better than `peer`'s by the factor `limit`."""

    row: str
    limit: float
    peer: str = ""


BARS = (
    Bar("sync_p50_us", 1 / 0.9, "process_pool"),
    Bar("sync_p50_us", 6, "ray"),
    Bar("sync_p99_us", 1, "process_pool"),
    Bar("busy_sync_p99_us", 1000),
    Bar("async_tasks_per_s", 4, "process_pool"),
    Bar("async_tasks_per_s", 25, "ray"),
    Bar("actor_sync_p50_us", 6, "ray"),
    Bar("actor_async_per_s", 12, "ray"),
    Bar("fan_1_100_1_p50_us", 20, "ray"),
    Bar("chain100_per_task_us", 12, "ray"),
    Bar("nested10_p50_us", 8, "ray"),
    Bar("submit_us", 10),
    Bar("get_ready_us", 30),
    Bar("cold_start_s", 1.0),
    Bar("idle_rss_mib", 200),
    Bar("idle_cpu_percent", 1.0),
    Bar("core_us_per_task", 8),
    Bar("core_growth_ratio", 1.5),
    Bar("million_dropped_growth_mib", 8),
    Bar("million_kept_bytes_per_task", 1024),
)


def advantage(row: str, ours: float | None, theirs: float | None) -> float | None:
    """How many times better ours is than theirs; None if either was not measured."""
    if not ours or not theirs:
        return None
    return ours / theirs if larger_is_better(row) else theirs / ours


def verdicts(rows: Table) -> list[str]:
    """One line for each bar that these rows can tell about."""
    lines = []
    for bar in BARS:
        cells = rows.get(bar.row, {})
        ours = cells.get("rtml")
        if ours is None:
            continue
        if not bar.peer:
            lines.append(_line(ours <= bar.limit, f"{bar.row} at most {bar.limit:g}: {ours:,.4g}"))
            continue
        factor = advantage(bar.row, ours, cells.get(bar.peer))
        if factor is not None:
            lines.append(
                _line(factor >= bar.limit, f"{bar.row} {bar.limit:.3g}x better than {bar.peer}: {factor:.3g}x")
            )
    return lines


def _line(reached: bool, text: str) -> str:
    return f"  {'reached' if reached else 'MISSED '}  {text}"
