"""The dispatcher is killed while actors work."""

from __future__ import annotations

from typing import Literal

import pytest

import rtml
from tests.integration.engine import children_of_this, kill, processes
from tests.integration.test_actors import LINKS, Counter, Meeting


@pytest.mark.parametrize("link", LINKS)
def test_a_dispatcher_killed_under_load_loses_no_call_and_no_state(link: Literal["unix", "zmq"]) -> None:
    with rtml.connect(workers=2, link=link):
        (supervisor,) = children_of_this()
        counter, meeting = Counter.create(), Meeting.create()
        futures: list[rtml.Future[int]] = []
        for _ in range(3):
            futures += [counter.add.submit(1) for _ in range(2_000)]
            futures[-1_000].result(60)
            entered = [meeting.enter.submit(1) for _ in range(50)]
            for pid in processes(supervisor)["dispatcher"]:
                kill(pid)
            assert len(rtml.get(entered, timeout=60)) == 50
        assert rtml.get(futures, timeout=60) == list(range(1, 6_001))
        assert meeting.count.submit().result(20) == 150
