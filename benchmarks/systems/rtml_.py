"""rtml, through its public face alone."""

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


class Adder:
    """An actor."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, amount: int) -> int:
        self.value += amount
        return self.value


async def parent(width: int) -> int:
    """Submits `width` tasks from inside a task."""
    import rtml

    child = rtml.task(echo)
    return sum(await rtml.gather(*[child.submit(value) for value in range(width)]))


class Rtml(System):
    """Two workers in an embedded process tree."""

    name = "rtml"

    def start(self) -> None:
        import rtml

        self.rtml = rtml
        self.client = rtml.connect(workers=2)
        self.echo = rtml.task(echo)
        self.echo.submit(1).result()

    def warm(self) -> None:
        """The other functions, and the second worker."""
        task = self.rtml.task
        self.total, self.increment, self.last = task(total), task(increment), task(last)
        self.sum_of_part, self.parent = task(sum_of_part), task(parent)
        self.burst(500)

    def stop(self) -> None:
        self.client.shutdown()

    def version(self) -> str:
        from importlib.metadata import version

        return version("rtml")

    def submit(self, value: int) -> Future:
        return self.echo.submit(value)

    def get(self, future: Future) -> Any:
        return future.result()

    def wait(self, futures: list[Future]) -> None:
        self.rtml.wait(futures)

    def burst(self, count: int) -> list[Any]:
        results: list[Any] = self.rtml.get([self.echo.submit(value) for value in range(count)])
        return results

    def actor(self) -> Any:
        made = self.rtml.actor(Adder).create()
        made.add.submit(0).result()
        return made

    def add(self, actor: Any, amount: int) -> Future:
        return actor.add.submit(amount)

    def added(self, actor: Any, count: int) -> list[Any]:
        results: list[Any] = self.rtml.get([actor.add.submit(1) for _ in range(count)])
        return results

    def fan(self, width: int) -> Any:
        root = self.echo.submit(0)
        return self.total.submit([self.echo.submit(index, root) for index in range(width)]).result()

    def chain(self, length: int) -> Any:
        future: Any = 0
        for _ in range(length):
            future = self.increment.submit(future)
        return future.result()

    def nested(self, width: int) -> Any:
        return self.parent.submit(width).result()

    def argument(self, array: Any) -> Any:
        return self.last.submit(array).result()

    def put_and_read(self, array: Any, readers: int) -> list[Any]:
        shared = self.rtml.put(array)
        results: list[Any] = self.rtml.get([self.sum_of_part.submit(shared, reader) for reader in range(readers)])
        return results


if __name__ == "__main__":
    main(Rtml())
