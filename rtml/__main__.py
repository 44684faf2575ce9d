"""The command `rtml`: starts the processes, and asks a running engine.

    rtml serve examples.ocr.app:app          gateway and engine in one command
    rtml up                                  the same without an app: an engine to connect to, and its metrics
    rtml gateway module:app --address ...    a gateway for an engine that runs elsewhere
    rtml dispatcher --listen ...             a dispatcher alone
    rtml worker --dispatcher tcp://...       a node that works for it
    rtml keys make DIR                       keys for engines that are spread over machines
    rtml tokens make TENANT                  a bearer token for the gateway's clients
    rtml status | trace [GRAPH]              what an engine does, and where a graph's time went
    rtml bench                               how fast this machine is, in a few seconds

Every option can be given as an environment variable too; `--help` names it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import NoReturn, TypeVar

from rtml import settings as config
from rtml.errors import RtmlError
from rtml.link import AddressError

_S = TypeVar("_S", bound=config.Settings)

#: Exit codes, as shells expect them.
_FAILED = 1
_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; ends the process with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["dispatcher"]:
        from rtml.dispatcher import main as run_dispatcher

        try:
            run_dispatcher(_dispatcher_arguments(given[1:], os.environ), _say)
        except AddressError as error:
            _fail(f"rtml dispatcher: {error}", _USAGE)
        return
    options = _parser().parse_args(given)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        code = run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has seen enough. What is still buffered must not fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _FAILED
    except (ValueError, TypeError) as error:  # what was asked for cannot be done: `AddressError` is one, too
        _fail(f"rtml {options.command}: {error}", _USAGE)
    except (RtmlError, OSError) as error:
        _fail(f"rtml {options.command}: {error}", _FAILED)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="rtml", description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"rtml {metadata.version('rtml')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, *kinds: type[config.Settings]) -> None:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in ("serve", "gateway"):
            command.add_argument(
                "apps", nargs="*", metavar="MODULE:APP", help="what to serve, like examples.ocr.app:app"
            )
        if name == "trace":
            command.add_argument(
                "graph", nargs="?", default="", help="id of a graph or trace; by default the last graph"
            )
        if name in ("status", "trace"):
            command.add_argument("--json", action="store_true", help="the raw answer")
        if name == "tokens":
            command.add_argument("action", choices=["make"], help="make: print a new one, and its line for the file")
            command.add_argument("tenant", help="whose it is")
        if name == "keys":
            command.add_argument("action", choices=["make"], help="make: write new ones")
            command.add_argument("directory", metavar="DIR", help="where to write them; must not have any yet")
        for kind in kinds:
            config.add_arguments(command, kind)
        command.set_defaults(run=run)

    engine, http, address = config.EngineSettings, config.HttpSettings, config.DispatcherAddress
    keys, objects = config.KeySettings, config.ObjectSettings
    add("serve", _serve, "serve apps over HTTP, with an engine of their own", http, engine, keys, objects)
    add("up", _serve, "start an engine to connect to, and a gateway without apps", http, engine, keys, objects)
    add("gateway", _gateway, "serve apps over HTTP, on an engine that is running", http, address, keys)
    add("worker", _worker, "run a node that works for a dispatcher elsewhere", config.NodeSettings, keys, objects)
    commands.add_parser("dispatcher", help="run a dispatcher alone; see rtml dispatcher --help")
    add("status", _status, "show what an engine is doing", address, keys)
    add("trace", _trace, "show where the time of a graph went", address, keys)
    add("keys", _keys, "make the keys of tcp links")
    add("tokens", _tokens, "make a bearer token for the gateway")
    add("bench", _bench, "measure the engine on this machine", config.BenchSettings, engine)
    return parser


def _say(line: str) -> None:
    print(line, flush=True)


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


def _load(kind: type[_S], options: argparse.Namespace) -> _S:
    """The command's settings; a wrong one ends the process."""
    try:
        return config.load(kind, vars(options), os.environ)
    except ValueError as error:
        _fail(f"rtml {options.command}: {error}", _USAGE)


def _load_engine(options: argparse.Namespace) -> config.EngineSettings:
    """Those of an engine that is started here; a limit that does not exist ends the process too."""
    from rtml.client.embedded import limit_arguments

    engine = _load(config.EngineSettings, options)
    try:
        limit_arguments(engine.limits)
    except ValueError as error:
        _fail(f"rtml {options.command}: {error}", _USAGE)
    return engine


def _serve(options: argparse.Namespace) -> int:
    http, engine = _load(config.HttpSettings, options), _load_engine(options)
    return _run(options, http, engine, None)


def _gateway(options: argparse.Namespace) -> int:
    from rtml.operating import find_address

    http, engine = _load(config.HttpSettings, options), _load(config.DispatcherAddress, options)
    return _run(options, http, engine, find_address(engine.address))


def _run(options: argparse.Namespace, http: config.HttpSettings, engine: config.Settings, address: str | None) -> int:
    """The gateway process, on the engine at `address` or on one of its own."""
    from rtml.serving.running import run

    apps = getattr(options, "apps", [])
    if options.command != "up" and not apps and not http.model_repository:
        _fail(f"rtml {options.command}: name an app (MODULE:APP) or a model repository (--model-repository)", _USAGE)
    keys = _load(config.KeySettings, options)
    shown, arguments = [http, engine, keys], {}
    if isinstance(engine, config.EngineSettings):
        objects = _load(config.ObjectSettings, options)
        shown.append(objects)
        arguments = engine.for_connect() | objects.for_connect()
    arguments["keys"] = keys.keys
    _say(f"rtml {options.command}: {config.show(*shown)}")
    return run(apps, http, address, arguments, _say)


def _ask(options: argparse.Namespace, what: str, argument: str = "") -> str:
    from rtml.operating import ask

    address, keys = _load(config.DispatcherAddress, options).address, _load(config.KeySettings, options).keys
    return ask(address, what, argument, keys=keys)


def _keys(options: argparse.Namespace) -> int:
    from rtml.link.keys import make_keys

    for path in make_keys(options.directory):
        print(path)
    return 0


def _tokens(options: argparse.Namespace) -> int:
    from rtml.serving.tokens import make

    token, line = make(options.tenant)
    print(f"token, for the client; it is shown only now:\n{token}\nline for the file of --tokens:\n{line}")
    return 0


def _worker(options: argparse.Namespace) -> int:
    from rtml.node import run

    node, keys = _load(config.NodeSettings, options), _load(config.KeySettings, options)
    objects = _load(config.ObjectSettings, options)
    if not node.dispatcher:
        _fail("rtml worker: --dispatcher is missing: the address of the dispatcher to work for", _USAGE)

    _say(f"rtml worker: {config.show(node, keys, objects)}")
    return run(node, keys.keys, _say, objects)


def _status(options: argparse.Namespace) -> int:
    from rtml.operating import describe_status

    answer = _ask(options, "status")
    print(answer if options.json else describe_status(answer))
    return 0


def _trace(options: argparse.Namespace) -> int:
    from rtml.operating import describe_trace

    answer = _ask(options, "trace", options.graph)
    print(answer if options.json else describe_trace(answer))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from rtml.operating import measure

    length, engine = _load(config.BenchSettings, options), _load_engine(options)
    print(f"rtml bench: {config.show(length, engine)}", flush=True)
    for name, figure in measure(length.seconds, **engine.for_connect()).items():
        print(f"{name:24} {figure:12,.1f}")
    return 0


def _dispatcher_arguments(given: list[str], environment: Mapping[str, str]) -> list[str]:
    """The dispatcher's own arguments, with what the environment adds to them."""
    from rtml.graph.tables import Limits

    added: list[str] = []
    for name in ("listen", "shm_dir", "keys", "policy", *Limits._fields):
        option, value = "--" + name.replace("_", "-"), environment.get(config.PREFIX + name.upper())
        if value and not any(argument == option or argument.startswith(option + "=") for argument in given):
            for part in value.split(",") if name == "listen" else [value]:
                added += [option, part.strip()]
    return added + given


if __name__ == "__main__":
    main()
