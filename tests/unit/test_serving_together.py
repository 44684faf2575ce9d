"""What all processes of a gateway do alike."""

from __future__ import annotations

from typing import Any

import pytest

from rtml.errors import InvalidInput
from rtml.serving.http import HttpError
from rtml.serving.member import CommandFailed, Do, Whole
from rtml.serving.together import EverywhereRepository, Together

pytestmark = pytest.mark.asyncio


class Network:
    """Carries commands between processes, which are objects here."""

    def __init__(self) -> None:
        self.members: list[FakePeers] = []


class FakePeers:
    """One process's hand on the others."""

    def __init__(self, network: Network) -> None:
        self._network = network
        network.members.append(self)
        self.commands: dict[str, Do] = {}
        self.silent = False

    def on_command(self, kind: str, do: Do) -> None:
        self.commands[kind] = do

    async def broadcast(self, kind: str, key: str, payload: bytes = b"") -> None:
        for member in self._network.members:
            try:
                await member.commands[kind](key, payload)
            except Exception as error:
                raise CommandFailed(str(error), getattr(error, "status", 500)) from error

    async def collect(self, kind: str) -> list[str]:
        if self.silent:
            raise TimeoutError
        return [await member.commands[kind]("", b"") or "" for member in self._network.members]

    async def metrics(self) -> str:
        return ""

    async def caught_up(self) -> None:
        pass

    @property
    def whole(self) -> Whole:
        return Whole(1, 1)


async def test_alone_everything_is_a_plain_call() -> None:
    together = Together(None)
    done: list[Any] = []

    async def do(key: str, fields: dict[str, Any]) -> None:
        done.append((key, fields))

    together.on("paint", do)
    together.answer("colours", lambda: ["red"])
    await together.do("paint", "door", {"colour": "red"})
    assert done == [("door", {"colour": "red"})]
    assert await together.ask("colours") == [["red"]]


async def test_all_processes_do_it_and_answer() -> None:
    network = Network()
    doors: dict[int, str] = {}

    def process(number: int) -> tuple[Together, FakePeers]:
        peers = FakePeers(network)
        together = Together(peers)

        async def do(key: str, fields: dict[str, Any]) -> None:
            if fields["colour"] == "none":
                raise InvalidInput("no colour")
            if number and fields["colour"] == "odd":
                raise ZeroDivisionError("secret")
            doors[number] = fields["colour"]

        together.on("paint", do)
        together.answer("colours", lambda: doors.get(number))
        return together, peers

    (one, peers), (other, _) = process(0), process(1)
    await one.do("paint", "door", {"colour": "red"})
    assert doors == {0: "red", 1: "red"}
    assert await other.ask("colours") == ["red", "red"]
    with pytest.raises(HttpError, match="no colour") as caught:
        await other.do("paint", "door", {"colour": "none"})
    assert caught.value.status == 400
    with pytest.raises(HttpError) as caught:
        await one.do("paint", "door", {"colour": "odd"})
    assert caught.value.status == 500
    peers.silent = True
    assert await one.ask("colours") == ["odd"]


async def test_a_model_is_loaded_and_unloaded_in_every_process() -> None:
    network = Network()
    asked: list[Any] = []

    class Own:
        async def load(self, name: str, parameters: Any) -> None:
            asked.append((name, parameters))

        async def unload(self, name: str, unload_dependents: bool = False) -> None:
            asked.append((name, unload_dependents))

    repositories = [EverywhereRepository(Own(), Together(FakePeers(network))) for _ in range(2)]
    await repositories[1].load("m", {"config": "{}"})
    await repositories[0].unload("m", True)
    assert asked == [("m", {"config": "{}"})] * 2 + [("m", True)] * 2


async def test_what_requests_may_not_do_no_process_is_asked_for() -> None:
    def refuse() -> None:
        raise HttpError(503, "explicit model load / unload is not allowed", "NotAllowed", {})

    class Own:
        async def load(self, name: str, parameters: Any) -> None:
            raise AssertionError

        async def unload(self, name: str, unload_dependents: bool = False) -> None:
            raise AssertionError

    repository = EverywhereRepository(Own(), Together(FakePeers(Network())), refuse)
    for call in (repository.load("m", {}), repository.unload("m")):
        with pytest.raises(HttpError) as caught:
            await call
        assert (caught.value.kind, caught.value.headers) == ("NotAllowed", {})
