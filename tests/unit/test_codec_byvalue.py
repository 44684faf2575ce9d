"""What programs define in `__main__` and cloudpickle alone does not carry: there, in another process, and back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rtml.codec.byvalue import has_name, reduction

#: Sends itself what it defines by way of a process with another `__main__`, and prints what that does there, and what
#: is the same when it is back.
PROGRAM = """
import abc, collections, functools, subprocess, sys, typing
from dataclasses import dataclass, field
from rtml import codec

@functools.lru_cache(maxsize=7)
def fibonacci(n):
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

@functools.singledispatch
def depth(x):
    return 0

@depth.register
def _(x: list):
    return 1 + max([depth(y) for y in x], default=0)

Meters = typing.NewType("Meters", int)
def walk(distance: Meters, back: typing.Optional[Meters] = None) -> Meters:
    return distance

class Slots:
    __slots__ = ("plain", "__hidden", "__weakref__")
    def __init__(self):
        self.plain, self.__hidden = 1, 2
    def hidden(self):
        return self.__hidden

class More(Slots):
    __slots__ = "more"

class Open(Slots):
    pass

class Pair(typing.NamedTuple):
    a: int
    b: int = 2

Point = collections.namedtuple("Point", "x y")

class Abstract(abc.ABC):
    __slots__ = ("x",)
    @abc.abstractmethod
    def get(self): ...

class Concrete(Abstract):
    __slots__ = ()
    def get(self):
        return self.x

def concrete():
    made = Concrete()
    made.x = 6
    return made

@dataclass(slots=True)
class Data:
    x: int
    y: list = field(default_factory=list)

class Square:
    def __init__(self, side):
        self.side = side
    @functools.cached_property
    def area(self):
        return self.side**2
    @functools.lru_cache
    def times(self, n):
        return self.side * n
    @functools.singledispatchmethod
    def kind(self, x):
        return "any"
    @kind.register
    def _(self, x: int):
        return "int"

def more():
    made = More()
    made.more = 3
    return made

def opened():
    made = Open()
    made.other = 4
    return made

class Checks:
    def cached(self):
        return fibonacci(80), fibonacci.cache_parameters()
    def dispatched(self):
        return depth([[1], [[2]]])
    def annotated(self):
        return walk(Meters(3)), walk.__annotations__["distance"].__name__
    def slots(self):
        return Slots().hidden(), hasattr(Slots(), "__dict__"), more().more, hasattr(more(), "__dict__"), opened().other
    def methods(self):
        square = Square(3)
        return square.area, square.area, square.times(2), square.kind(1), square.kind("")

checks = Checks()
values = [Slots(), more(), opened(), Data(1, [2]), Square(5), Pair(1), Point(3, 4), concrete()]
sent = codec.encode_value((checks, values), None).payload
other = "import sys; from rtml import codec; c, v = codec.decode_value(sys.stdin.buffer.read(), None);"
other += "out = [getattr(c, n)() for n in ('cached', 'dispatched', 'annotated', 'slots', 'methods')];"
other += "sys.stdout.buffer.write(codec.encode_value((out, v), None).payload)"
done = subprocess.run([sys.executable, "-c", other], input=sent, capture_output=True)
assert done.returncode == 0, done.stderr.decode()
results, back = codec.decode_value(done.stdout, None)
for result in results:
    print(result)
print(all([type(b) is type(v) for b, v in zip(back, values)]), back[0].hidden(), back[1].more, back[2].other)
print(back[3], back[4].area, *back[5:7], back[7].get())
"""


def test_what_main_defines_travels_by_value(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "(23416728348467685, {'maxsize': 7, 'typed': False})",
        "3",
        "(3, 'Meters')",
        "(2, False, 3, False, 4)",
        "(9, 9, 6, 'int', 'any')",
        "True 2 3 4",
        "Data(x=1, y=[2]) 25 Pair(a=1, b=2) Point(x=3, y=4) 6",
    ]


def test_what_can_be_imported_travels_by_name() -> None:
    import fnmatch

    compiled = fnmatch._compile_pattern  # type: ignore[attr-defined]
    assert has_name(compiled)
    assert reduction(compiled) is None
