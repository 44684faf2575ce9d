"""The tables and links of the documents agree with the code."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import msgspec
import pytest

import rtml
from rtml import errors, settings
from rtml.client.functions import make_options
from rtml.graph.state import TRANSITIONS, State
from rtml.graph.tables import Limits
from rtml.messages import Options
from rtml.metrics import Alias, Counter, DispatcherMetrics, Family, GatewayMetrics, Metrics
from rtml.serving.accesslog import Line
from tests.integration import docs

GUIDE, SERVING, OPERATIONS, METRICS = (
    docs.ROOT / "docs" / f"{name}.md" for name in ("guide", "serving", "operations", "metrics")
)

DOCUMENTS = [*docs.PAGES, *(docs.ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"))]


def test_options() -> None:
    names = [docs.code(row[0])[0] for row in docs.table(GUIDE, "option")]
    assert sorted(names) == sorted([*Options.__struct_fields__, "retry_on"])
    make_options(dict.fromkeys(Options.__struct_fields__))


def test_errors() -> None:
    described = {docs.code(row[0])[0]: (docs.code(row[0])[1:], int(row[2])) for row in docs.table(GUIDE, "error")}
    known = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.RtmlError) and kind is not errors.RtmlError
    }
    assert described.keys() == known.keys()
    from rtml.serving.http import status_of

    for name, (also, status) in described.items():
        assert status == status_of(known[name]("message")), name
        for other in also:
            assert other.rpartition(".")[2] in [base.__name__ for base in known[name].__mro__[1:]], name


KINDS = (
    settings.HttpSettings,
    settings.EngineSettings,
    settings.DispatcherAddress,
    settings.KeySettings,
    settings.BenchSettings,
)


@pytest.mark.parametrize(
    ("kinds", "head"),
    [(KINDS, "option"), ((settings.NodeSettings,), "worker's option"), ((settings.ObjectSettings,), "object option")],
)
def test_settings(kinds: tuple[type[settings.Settings], ...], head: str) -> None:
    expected = []
    for kind in kinds:
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in msgspec.structs.fields(kind):
            default = "-" if field.default in (None, "", (), msgspec.NODEFAULT) else str(field.default)
            option, variable = settings.option_of(field.name, kind), settings.PREFIX + field.name.upper()
            meaning = typing.get_args(hints[field.name])[1].description
            expected.append([f"`{option}`", f"`{variable}`", default, meaning])
    rows = docs.table(OPERATIONS, head)
    assert [[row[0], row[1], row[2], row[-1]] for row in rows] == expected


def test_which_command_has_which_setting(capsys: pytest.CaptureFixture[str]) -> None:
    from rtml.__main__ import main

    helps = {}
    for command in ("serve", "up", "gateway", "status", "trace", "bench"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        helps[command] = capsys.readouterr().out
    for row in docs.table(OPERATIONS, "option"):
        (option,) = docs.code(row[0])
        having = [name for name in helps if re.search(rf"{option}\b(?!-)", helps[name])]
        assert having == row[3].split(", "), option


def test_arguments_of_connect() -> None:
    described = {docs.code(row[0])[0] for row in docs.table(OPERATIONS, "argument")}
    with pytest.raises(TypeError, match="there are") as refused:
        rtml.connect(nonsense=1)
    node = set(str(refused.value).partition("there are ")[2].split(", "))
    shared = set(settings.EngineSettings.__struct_fields__)
    shared |= set(settings.ObjectSettings.__struct_fields__)
    assert described | shared == node | {"address"}


def test_limits() -> None:
    rows = [(docs.code(row[0])[0], row[1]) for row in docs.table(OPERATIONS, "limit")]
    assert rows == [(name, str(value)) for name, value in Limits()._asdict().items()]


@pytest.mark.parametrize(("head", "metrics"), [("metric", GatewayMetrics()), ("name", DispatcherMetrics())])
def test_metrics(head: str, metrics: Metrics) -> None:
    expected = [
        (
            family.name + ("_total" if isinstance(family, Counter) else ""),
            type(family).__name__.lower(),
            list(family.label_names),
        )
        for family in vars(metrics).values()
        if isinstance(family, Family) and not isinstance(family, Alias)
    ]
    assert [(docs.code(row[0])[0], row[1], docs.code(row[2])) for row in docs.table(METRICS, head)] == expected


def test_fields_of_the_access_log() -> None:
    text = OPERATIONS.read_text()
    start = text.index("`--access-log FILE`")
    assert docs.code(text[start : text.index("times are in seconds", start)])[2:] == list(Line.__struct_fields__)


def test_aliases_of_metrics() -> None:
    aliases = [family for family in vars(GatewayMetrics()).values() if isinstance(family, Alias)]
    expected = [(alias.name, alias.kind, list(alias.label_names)) for alias in aliases]
    assert [(docs.code(row[0])[0], row[1], docs.code(row[2])) for row in docs.table(METRICS, "alias")] == expected


def test_transitions() -> None:
    text = docs.table(docs.ROOT / "ARCHITECTURE.md", "state")
    assert [row[0] for row in text] == [f"`{name}`" for name in State.NAMES]
    for row, following in zip(text, TRANSITIONS):
        assert sorted(docs.code(row[1])) == sorted(State.NAMES[state] for state in following)


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        found = page.parent / path if path else page
        assert found.exists(), target
        if anchor:
            lines = found.read_text().split("\n")
            assert anchor in [line.strip("# ").lower().replace(" ", "-") for line in lines if line[:1] == "#"], target
