"""Small ONNX models, written byte by byte, so that tests need neither the onnx package nor model files.

model([node("Add", ["x", "x"], ["y"])], inputs=[tensor("x", FLOAT, ("N", 3))], outputs=[tensor("y", FLOAT, ("N", 3))])
"""

from __future__ import annotations

from collections.abc import Iterable

FLOAT, INT64, STRING = 1, 7, 8


def field(number: int, value: int | bytes | str) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def tensor(name: str, dtype: int, shape: Iterable[int | str] | None) -> bytes:
    """An input or output; a string in the shape names a dimension of any size."""
    inner = field(1, dtype)
    if shape is not None:
        inner += field(2, b"".join(field(1, field(1, d) if isinstance(d, int) else field(2, d)) for d in shape))
    return field(1, name) + field(2, field(1, inner))


def node(op: str, inputs: Iterable[str], outputs: Iterable[str]) -> bytes:
    return b"".join(field(1, name) for name in inputs) + b"".join(field(2, name) for name in outputs) + field(4, op)


def model(
    nodes: Iterable[bytes],
    inputs: Iterable[bytes],
    outputs: Iterable[bytes],
    weights: Iterable[bytes] = (),
    properties: dict[str, str] | None = None,
) -> bytes:
    graph = b"".join(field(1, each) for each in nodes) + field(2, "graph")
    graph += b"".join(field(5, each) for each in weights)
    graph += b"".join(field(11, each) for each in inputs) + b"".join(field(12, each) for each in outputs)
    extra = b"".join(field(14, field(1, key) + field(2, value)) for key, value in (properties or {}).items())
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 17)) + extra


def weight(name: str, values: Iterable[int]) -> bytes:
    """A one-dimensional INT64 constant."""
    values = list(values)
    return field(1, len(values)) + field(2, INT64) + b"".join(field(7, value) for value in values) + field(8, name)


def doubler(shape: Iterable[int | str] = ("N", 3)) -> bytes:
    """y = x + x."""
    shape = list(shape)
    return model([node("Add", ["x", "x"], ["y"])], [tensor("x", FLOAT, shape)], [tensor("y", FLOAT, shape)])


def sum_and_product() -> bytes:
    """sum = a + b, product = a * b, of shape [N, 2]."""
    ab = [tensor(name, FLOAT, ("N", 2)) for name in "ab"]
    out = [tensor(name, FLOAT, ("N", 2)) for name in ("sum", "product")]
    return model([node("Add", "ab", ["sum"]), node("Mul", "ab", ["product"])], ab, out)


def picker() -> bytes:
    """y = table[x], table of three numbers: another index is an error at run time. x has the shape [N]."""
    return model(
        [node("Gather", ["table", "x"], ["y"])],
        [tensor("x", INT64, ("N",))],
        [tensor("y", INT64, ("N",))],
        weights=[weight("table", [10, 20, 30])],
        properties={"author": "somebody"},
    )


def total() -> bytes:
    """y = sum of all elements of x: an output that cannot be split among calls."""
    return model([node("ReduceSum", ["x"], ["y"])], [tensor("x", FLOAT, ("N",))], [tensor("y", FLOAT, (1,))])


def adder(number: int) -> bytes:
    """y = x + number, of shape [N]."""
    shape = [tensor(name, INT64, ("N",)) for name in "xy"]
    return model([node("Add", ["x", "number"], ["y"])], shape[:1], shape[1:], weights=[weight("number", [number])])


def accumulator(sign: str = "Add") -> bytes:
    """y = t = s + x (or s - x: "Sub"), of shape [N, 1]: with s the last t, the sum of what came."""
    shape: tuple[int | str, ...] = ("N", 1)
    return model(
        [node(sign, ["s", "x"], ["y"]), node(sign, ["s", "x"], ["t"])],
        [tensor(name, FLOAT, shape) for name in "xs"],
        [tensor(name, FLOAT, shape) for name in "yt"],
    )


def controlled() -> bytes:
    """Control inputs of shape [N, 1] come back as outputs, called like them with an "o" before; x is dropped."""
    names = ("start", "end", "ready", "corrid")
    shape: tuple[int | str, ...] = ("N", 1)
    kinds = {"corrid": INT64}
    return model(
        [node("Identity", [name], ["o" + name]) for name in ("x", *names)],
        [tensor(name, kinds.get(name, FLOAT), shape) for name in ("x", *names)],
        [tensor("o" + name, kinds.get(name, FLOAT), shape) for name in ("x", *names)],
    )
