"""Dask's distributed scheduler on this machine: two worker processes of one thread, no dashboard."""

from __future__ import annotations

from typing import Any

from benchmarks.measure import MIB, Future, System, main


def echo(value: int, _after: Any = None) -> int:
    return value


def total(values: list[int]) -> int:
    return sum(values)


def increment(value: int) -> int:
    return value + 1


def last(array: Any) -> float:
    return float(array[-1])


def sum_of_part(array: Any, reader: int) -> float:
    """Sums one MiB of the array."""
    width = MIB // 8
    return float(array[reader * width : (reader + 1) * width].sum())


def parent(width: int) -> int:
    """Submits `width` tasks from inside a task."""
    from distributed import worker_client

    with worker_client() as client:
        return sum(client.gather([client.submit(echo, value, pure=False) for value in range(width)]))


class Dask(System):
    """Tasks by `Client.submit`, not deduplicated (`pure=False`); arrays by `scatter`, as its documentation asks."""

    name = "dask"

    def start(self) -> None:
        import dask
        from distributed import Client, LocalCluster

        dask.config.set({"distributed.admin.log-length": 0, "distributed.comm.timeouts.connect": "60s"})
        self.cluster = LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
        )
        self.client = Client(self.cluster)
        self.get(self.submit(1))

    def warm(self) -> None:
        """Both workers."""
        self.client.gather(self.client.map(echo, range(500), pure=False))

    def stop(self) -> None:
        self.client.close()
        self.cluster.close()

    def version(self) -> str:
        import distributed

        return str(distributed.__version__)

    def submit(self, value: int) -> Future:
        return self.client.submit(echo, value, pure=False)

    def get(self, future: Future) -> Any:
        return future.result()

    def wait(self, futures: list[Future]) -> None:
        from distributed import wait

        wait(futures)

    def burst(self, count: int) -> list[Any]:
        results: list[Any] = self.client.gather(self.client.map(echo, range(count), pure=False))
        return results

    def fan(self, width: int) -> Any:
        root = self.submit(0)
        values = [self.client.submit(echo, index, root, pure=False) for index in range(width)]
        return self.client.submit(total, values, pure=False).result()

    def chain(self, length: int) -> Any:
        future: Any = 0
        for _ in range(length):
            future = self.client.submit(increment, future, pure=False)
        return future.result()

    def nested(self, width: int) -> Any:
        return self.client.submit(parent, width, pure=False).result()

    def argument(self, array: Any) -> Any:
        shared = self.client.scatter(array, hash=False)
        return self.client.submit(last, shared, pure=False).result()

    def put_and_read(self, array: Any, readers: int) -> list[Any]:
        shared = self.client.scatter(array, hash=False)
        futures = [self.client.submit(sum_of_part, shared, reader, pure=False) for reader in range(readers)]
        results: list[Any] = self.client.gather(futures)
        return results


if __name__ == "__main__":
    main(Dask())
