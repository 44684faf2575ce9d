"""Ray on this machine: two CPUs, no dashboard, no usage report."""

from __future__ import annotations

from typing import Any

from benchmarks.measure import MIB, Future, System, main


def echo(value: int, _after: Any = None) -> int:
    return value


def total(*values: int) -> int:
    return sum(values)


def increment(value: int) -> int:
    return value + 1


def last(array: Any) -> float:
    return float(array[-1])


def sum_of_part(array: Any, reader: int) -> float:
    """Sums one MiB of the array."""
    width = MIB // 8
    return float(array[reader * width : (reader + 1) * width].sum())


class Adder:
    """An actor."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, amount: int) -> int:
        self.value += amount
        return self.value


class Ray(System):
    """Tasks as remote functions, values by `ray.get`."""

    name = "ray"

    def start(self) -> None:
        import os

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        import ray

        self.ray = ray
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            object_store_memory=2 << 30,
            _node_ip_address="127.0.0.1",
        )
        self.echo = ray.remote(echo)
        ray.get(self.echo.remote(1))

    def warm(self) -> None:
        """The other functions, and a second worker process."""
        ray = self.ray
        self.total, self.increment = ray.remote(total), ray.remote(increment)
        self.last, self.sum_of_part = ray.remote(last), ray.remote(sum_of_part)
        inner = self.echo

        def parent(width: int) -> int:
            return sum(ray.get([inner.remote(value) for value in range(width)]))

        self.parent = ray.remote(parent)
        ray.get([self.echo.remote(1) for _ in range(500)])

    def stop(self) -> None:
        self.ray.shutdown()

    def version(self) -> str:
        return str(self.ray.__version__)

    def submit(self, value: int) -> Future:
        return self.echo.remote(value)

    def get(self, future: Future) -> Any:
        return self.ray.get(future)

    def wait(self, futures: list[Future]) -> None:
        self.ray.wait(futures, num_returns=len(futures))

    def burst(self, count: int) -> list[Any]:
        results: list[Any] = self.ray.get([self.echo.remote(value) for value in range(count)])
        return results

    def actor(self) -> Any:
        # With a cpu each, as by default, no more than two could be made.
        made = self.ray.remote(num_cpus=0)(Adder).remote()
        self.ray.get(made.add.remote(0))
        return made

    def add(self, actor: Any, amount: int) -> Future:
        return actor.add.remote(amount)

    def added(self, actor: Any, count: int) -> list[Any]:
        results: list[Any] = self.ray.get([actor.add.remote(1) for _ in range(count)])
        return results

    def fan(self, width: int) -> Any:
        root = self.echo.remote(0)
        return self.ray.get(self.total.remote(*[self.echo.remote(index, root) for index in range(width)]))

    def chain(self, length: int) -> Any:
        future = 0
        for _ in range(length):
            future = self.increment.remote(future)
        return self.ray.get(future)

    def nested(self, width: int) -> Any:
        return self.ray.get(self.parent.remote(width))

    def argument(self, array: Any) -> Any:
        return self.ray.get(self.last.remote(array))

    def put_and_read(self, array: Any, readers: int) -> list[Any]:
        shared = self.ray.put(array)
        results: list[Any] = self.ray.get([self.sum_of_part.remote(shared, reader) for reader in range(readers)])
        return results


if __name__ == "__main__":
    main(Ray())
