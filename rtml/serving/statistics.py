"""What the statistics extension of the Open Inference Protocol says of a model. Pure counters: no clock, no engine.

Times come from the engine (`rtml.messages.Timing`) and mean, in the protocol's words,

* `queue`: until the call was handed to an executor (its wait for arguments and for its turn),
* `compute_input`: between dispatcher and executor, both ways,
* `compute_infer`: inside the function, for the whole batch that the call was part of,
* `compute_output`: nothing; results travel with what `compute_input` counts.

`inference_count` counts rows, `execution_count` runs of the function: calls that shared a run count for a part.
"""

from __future__ import annotations

from typing import Any, Final

from rtml.messages import Timing

_NANO: Final = 1e9
#: Of `inference_stats`, in the order of the protocol.
STEPS: Final = (
    "success",
    "fail",
    "queue",
    "compute_input",
    "compute_infer",
    "compute_output",
    "cache_hit",
    "cache_miss",
)
#: Different batch sizes of which a model keeps count; larger ones count as the last that was new.
_SIZES_MAX: Final = 4096
#: Requests that are counted at a time.
_RECENT_MAX: Final = 256


class Duration:
    """How often something was done, and the seconds it took in all."""

    __slots__ = ("count", "seconds")

    def __init__(self, count: float = 0, seconds: float = 0.0) -> None:
        self.count = count
        self.seconds = seconds

    @classmethod
    def of(cls, said: dict[str, int]) -> Duration:
        """What `describe` said."""
        return cls(said["count"], said["ns"] / _NANO)

    def add(self, seconds: float, part: float = 1) -> None:
        """Once more; or, of what several shared, a part of it."""
        self.count += part
        self.seconds += seconds * part

    def merge(self, other: Duration) -> None:
        """Count what `other` counted."""
        self.count += other.count
        self.seconds += other.seconds

    def describe(self) -> dict[str, int]:
        """As the protocol shows it."""
        return {"count": round(self.count), "ns": round(self.seconds * _NANO)}


class BatchStatistics:
    """Of the runs with one number of rows."""

    __slots__ = ("infer", "input", "output")

    def __init__(self) -> None:
        self.input = Duration()
        self.infer = Duration()
        self.output = Duration()

    def describe(self, size: int) -> dict[str, Any]:
        """As the protocol shows it."""
        return {
            "batch_size": size,
            "compute_input": self.input.describe(),
            "compute_infer": self.infer.describe(),
            "compute_output": self.output.describe(),
        }


class ModelStatistics:
    """What is counted of one version of a model."""

    __slots__ = ("_recent", "batches", "executions", "last", "responses", "rows", "steps")

    def __init__(self) -> None:
        #: When the last request came, in milliseconds since 1970; 0: never.
        self.last = 0
        #: Rows inferred.
        self.rows = 0
        self.executions = 0.0
        self.steps = {step: Duration() for step in STEPS}
        #: Requests that were answered but are not counted yet: many at once cost less than each alone.
        self._recent: list[tuple[float, int, Timing | None]] = []
        #: By rows of a run.
        self.batches: dict[int, BatchStatistics] = {}
        #: Of streams, by the place of the response in its stream: success, fail.
        self.responses: dict[int, tuple[Duration, Duration]] = {}

    def succeeded(self, seconds: float, rows: int, timing: Timing | None, at: int) -> None:
        """A request was answered.

        Args:
            seconds: From its arrival to its answer.
            rows: How many inferences it was.
            timing: Where the engine spent them; None if it did not say.
            at: Milliseconds since 1970.
        """
        self.last = at
        self._recent.append((seconds, rows, timing))
        if len(self._recent) >= _RECENT_MAX:
            self._settle()

    def _settle(self) -> None:
        """Count the recent requests."""
        recent, self._recent = self._recent, []
        self.rows += sum([rows for _, rows, _ in recent])
        self.steps["success"].merge(Duration(len(recent), sum([seconds for seconds, _, _ in recent])))
        self.steps["compute_output"].count += len(recent)
        timed = [(rows, timing) for _, rows, timing in recent if timing is not None]
        self.executions += len(recent) - len(timed)
        queued = sum([timing.waiting + timing.queued for _, timing in timed])
        self.steps["queue"].merge(Duration(len(timed), queued))
        self.steps["compute_input"].merge(Duration(len(timed), sum([timing.transfer for _, timing in timed])))
        self.steps["compute_infer"].merge(Duration(len(timed), sum([timing.run for _, timing in timed])))
        alike: dict[tuple[int, int], list[Timing]] = {}
        for rows, timing in timed:
            alike.setdefault((rows, timing.batch), []).append(timing)
        for (rows, calls), timings in alike.items():
            self._ran(rows, calls, timings)

    def _ran(self, rows: int, calls: int, timings: list[Timing]) -> None:
        """Calls of `rows` rows, each of which shared its run with others: `calls` in all.

        The rows of the others are not known here; they are taken to be as many as this one's.
        """
        part = 1 / calls if calls > 1 else 1
        count = len(timings) * part
        self.executions += count
        size = rows * calls if calls > 1 else rows
        batch = self.batches.get(size)
        if batch is None:
            if len(self.batches) >= _SIZES_MAX:
                batch = self.batches[next(reversed(self.batches))]
            else:
                batch = self.batches[size] = BatchStatistics()
        batch.input.merge(Duration(count, sum([timing.transfer for timing in timings]) * part))
        batch.infer.merge(Duration(count, sum([timing.run for timing in timings]) * part))
        batch.output.count += count

    def failed(self, seconds: float) -> None:
        """A request ended without an answer."""
        self.steps["fail"].add(seconds)

    def responded(self, index: int, seconds: float, ok: bool) -> None:
        """A stream gave its response number `index`, `seconds` after the one before it."""
        index = min(index, _SIZES_MAX)
        found = self.responses.get(index)
        if found is None:
            found = self.responses[index] = (Duration(), Duration())
        found[0 if ok else 1].add(seconds)

    def merge(self, other: ModelStatistics) -> None:
        """Count what `other` counted, too: of another process, or of calls that did not come from clients."""
        self._settle()
        other._settle()
        self.last = max(self.last, other.last)
        self.rows += other.rows
        self.executions += other.executions
        for step, duration in other.steps.items():
            self.steps[step].merge(duration)
        for size, theirs in other.batches.items():
            batch = self.batches.setdefault(size, BatchStatistics())
            batch.input.merge(theirs.input)
            batch.infer.merge(theirs.infer)
            batch.output.merge(theirs.output)
        for index, (success, fail) in other.responses.items():
            found = self.responses.setdefault(index, (Duration(), Duration()))
            found[0].merge(success)
            found[1].merge(fail)

    @classmethod
    def of(cls, row: dict[str, Any]) -> ModelStatistics:
        """What `describe` said."""
        found = cls()
        found.last, found.rows, found.executions = row["last_inference"], row["inference_count"], row["execution_count"]
        found.steps = {step: Duration.of(row["inference_stats"][step]) for step in STEPS}
        for said in row["batch_stats"]:
            batch = found.batches[said["batch_size"]] = BatchStatistics()
            batch.input = Duration.of(said["compute_input"])
            batch.infer = Duration.of(said["compute_infer"])
            batch.output = Duration.of(said["compute_output"])
        for index, said in row["response_stats"].items():
            found.responses[int(index)] = (Duration.of(said["success"]), Duration.of(said["fail"]))
        return found

    def describe(self, name: str, version: str) -> dict[str, Any]:
        """An entry of `model_stats`."""
        self._settle()
        return {
            "name": name,
            "version": version,
            "last_inference": self.last,
            "inference_count": self.rows,
            "execution_count": round(self.executions),
            "inference_stats": {step: duration.describe() for step, duration in self.steps.items()},
            "response_stats": {
                str(index): {"success": success.describe(), "fail": fail.describe()}
                for index, (success, fail) in sorted(self.responses.items())
            },
            "batch_stats": [batch.describe(size) for size, batch in sorted(self.batches.items())],
            "memory_usage": [],
        }
