"""Collectives: many futures become one value, and one value gets to many nodes, planned while the futures arrive.

    total = rtml.reduce([gradient.submit(shard) for shard in shards], "mean")
    first = rtml.reduce(futures, "add", num=6)          # of the first six to arrive
    print(first.result(), first.contributors)           # [0, 1, 2, 4, 5, 7]

Nothing here waits: a reduction is a task, whose future can be an argument before any input exists. What it does is in
`rtml.client.reducing`, how it is planned in `rtml.graph.collectives`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rtml.client.future import Future, Ref
from rtml.client.gathered import Gathered


class Collectives:
    """These, as methods of a client."""

    def reduce(
        self: Any,
        futures: Iterable[Future[Any]],
        op: str | Callable[[Any, Any], Any] = "add",
        *,
        num: int | None = None,
        elementwise: bool = False,
    ) -> Future[Any]:
        """One value of the values of many futures, folded where they lie, as they arrive.

        Args:
            futures: of arrays of one shape; or of numbers, or of lists, tuples and dicts of either, alike in all.
            op: "add", "mean", "multiply", "minimum", "maximum", "logical_and", "logical_or", "bitwise_xor" and their
                like; one of numpy's functions of two arrays; or a function of two values that gives one. Any order and
                grouping must do.
            num: how many values are enough: those that arrive first. By default all are needed, and the first that
                fails is the result's error; with `num` failed ones are left out as long as enough others come.
            elementwise: the function of two values also works on pieces of arrays, so that it can begin before all of
                an array is there.

        Returns:
            The future of the value; its `contributors` are the positions of the futures that the value is made of.

        Raises:
            ValueError: there are no futures, `num` is not between 1 and their number, or `op` is unknown.
            TypeError: these are no futures, or `op` is nothing that can be called.
        """
        total: Future[Any] = self._reduce(futures, op, num, elementwise, everywhere=False)
        return total

    def allreduce(
        self: Any,
        futures: Iterable[Future[Any]],
        op: str | Callable[[Any, Any], Any] = "add",
        *,
        num: int | None = None,
        elementwise: bool = False,
    ) -> Future[Any]:
        """The same as `reduce`; when it ends, all nodes where inputs lie have a copy of the array.

        They receive it while it is made. Nodes that die meanwhile, and values that are no arrays, are not waited for.
        """
        total: Future[Any] = self._reduce(futures, op, num, elementwise, everywhere=True)
        return total

    def broadcast(self: Any, future: Future[Any], nodes: Iterable[str] | None = None) -> Future[list[str]]:
        """Have a large value on many nodes before it is needed there.

        Args:
            future: of any value; need not have ended.
            nodes: data endpoints ("host:port") of the nodes; by default of all that this client's dispatcher knows.

        Returns:
            The future of the list of nodes that have it.

        Raises:
            TypeError: this is no future.
        """
        from rtml.client.reducing import broadcast_here

        (member,) = members_of([future])
        chosen = list(self.nodes if nodes is None else nodes)
        return broadcast_here.submit_to(self, (Ref(member), chosen), {})

    def _reduce(self: Any, futures: Any, op: Any, num: int | None, elementwise: bool, *, everywhere: bool) -> Any:
        from rtml.client.folding import operation
        from rtml.client.reducing import reduce_here

        members = members_of(futures)
        if not members:
            raise ValueError("a reduction needs at least one future")
        wanted = len(members) if num is None else num
        if not 1 <= wanted <= len(members):
            raise ValueError(f"num={num} of {len(members)} futures")
        given = [Ref(one) for one in members]
        return reduce_here.submit_to(self, (given, operation(op, elementwise), wanted, everywhere), {})


def members_of(futures: Any) -> list[Future[Any]]:
    """The futures of a list, or of what `gather` returned.

    Raises:
        TypeError: there is something else.
    """
    if isinstance(futures, Gathered):
        futures = futures.members
    if isinstance(futures, Future) or not isinstance(futures, Iterable):
        raise TypeError(f"expected a list of rtml futures, got {type(futures).__name__}")
    members = [one.future if isinstance(one, Ref) else one for one in futures]
    for one in members:
        if not isinstance(one, Future) or isinstance(one, Gathered):
            raise TypeError(f"expected futures of tasks, got {type(one).__name__}")
    return members
