"""The standard library's ProcessPoolExecutor. It takes no futures as arguments: the driver carries the values."""

from __future__ import annotations

import platform
from typing import Any

from benchmarks.measure import MIB, Future, System, main


def echo(value: int) -> int:
    return value


def total(values: list[int]) -> int:
    return sum(values)


def increment(value: int) -> int:
    return value + 1


def last(array: Any) -> float:
    return float(array[-1])


def sum_of_part(name: str, reader: int) -> float:
    """Sums one MiB of the shared memory block `name`."""
    from multiprocessing import shared_memory

    import numpy

    block = shared_memory.SharedMemory(name)
    width = MIB // 8
    part = numpy.ndarray(width, dtype=numpy.float64, buffer=block.buf, offset=reader * MIB)
    result = float(part.sum())
    del part
    block.close()
    return result


class ProcessPool(System):
    """Two processes, the platform's default start method."""

    name = "process_pool"

    def start(self) -> None:
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # one for all, or each worker starts its own and complains at the end
        self.pool = ProcessPoolExecutor(2)
        self.pool.submit(echo, 1).result()

    def stop(self) -> None:
        self.pool.shutdown()

    def version(self) -> str:
        return platform.python_version()

    def submit(self, value: int) -> Future:
        return self.pool.submit(echo, value)

    def get(self, future: Future) -> Any:
        return future.result()

    def wait(self, futures: list[Future]) -> None:
        from concurrent.futures import wait

        wait(futures)

    def fan(self, width: int) -> Any:
        root = self.pool.submit(echo, 0).result()
        values = [self.pool.submit(echo, root + index) for index in range(width)]
        return self.pool.submit(total, [future.result() for future in values]).result()

    def chain(self, length: int) -> Any:
        value = 0
        for _ in range(length):
            value = self.pool.submit(increment, value).result()
        return value

    def nested(self, width: int) -> Any:
        return None  # a task cannot submit to its own pool

    def argument(self, array: Any) -> Any:
        return self.pool.submit(last, array).result()

    def put_and_read(self, array: Any, readers: int) -> list[Any]:
        from multiprocessing import shared_memory

        import numpy

        block = shared_memory.SharedMemory(create=True, size=array.nbytes)
        shared = numpy.ndarray(array.shape, dtype=array.dtype, buffer=block.buf)
        shared[:] = array
        futures = [self.pool.submit(sum_of_part, block.name, reader) for reader in range(readers)]
        results = [future.result() for future in futures]
        del shared
        block.close()
        block.unlink()
        return results


if __name__ == "__main__":
    main(ProcessPool())
