"""One process of a gateway of several: `python -m rtml.serving.child`, started by `rtml.serving.processes`."""

from __future__ import annotations

import signal
import sys

import uvloop

from rtml.errors import RtmlError
from rtml.link import AddressError
from rtml.serving.member import Member, Pipe, Start
from rtml.serving.running import load_apps, prepare_process, serve


def main() -> None:
    """Serve what the supervisor says, until it says so or is gone."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it is known what to read again
    number, pipe, page, *quotas = map(int, sys.argv[1:])
    prepare_process()
    try:
        code = uvloop.run(_run(number, pipe, page, quotas[0] if quotas else -1))
    except (RtmlError, AddressError, OSError, ValueError, TypeError) as error:
        sys.stderr.write(f"rtml gateway process {number}: {error}\n")
        code = 1
    sys.exit(code)


async def _run(number: int, descriptor: int, page: int, quotas: int) -> int:
    pipe = await Pipe.open(descriptor)
    start = await pipe.receive()
    if not isinstance(start, Start):
        return 1
    member = Member(pipe, number, page, quotas)
    try:
        return await serve(load_apps(start.apps), start.http, start.address, start.engine, _say_nothing, member)
    finally:
        await member.close()


def _say_nothing(line: str) -> None:
    """What there is to say the supervisor says, once for all."""


if __name__ == "__main__":
    main()
