"""Tokens, quotas, and what `rtml.serving.access` makes of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rtml.metrics import Counter
from rtml.serving import quotas, tokens
from rtml.serving.access import Access
from rtml.serving.http import HttpError
from rtml.serving.quotas import Table
from rtml.serving.tokens import Quota


@pytest.fixture
def table() -> Iterator[Table]:
    made = Table()
    yield made
    made.close()


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_made_token_is_found_by_its_line_and_no_other_is() -> None:
    token, line = tokens.make("acme")
    assert token not in line
    found = tokens.parse(f"# a comment\n\n{line} models=ocr-*,faces paths=/v1/* rate=2.5 # more\n")
    grant = found.find(f"Bearer {token}")
    assert grant is not None
    assert (grant.tenant, grant.models, grant.paths) == ("acme", ("ocr-*", "faces"), ("/v1/*",))
    assert found.quotas == {"acme": Quota(2.5)}
    assert found.find(f"bearer  {token} ") == grant
    for wrong in (
        "",
        token,
        f"Basic {token}",
        f"Bearer {token}x",
        "Bearer",
        "Bearer ",
        f"Bearer {token[:-1]}",
        "Bearer \udcff",
    ):
        assert found.find(wrong) is None, wrong


def test_a_digest_that_begins_alike_is_not_enough() -> None:
    token, line = tokens.make("acme")
    spoilt = line.replace(line[30:40], "0" * 10)
    assert tokens.parse(spoilt).find(f"Bearer {token}") is None


def test_quotas_of_a_tenant_are_those_of_all_its_lines() -> None:
    lines = [f"{tokens.make('acme')[1]} {more}" for more in ("rate=1 burst=5", "concurrency=2", "rate=3")]
    assert tokens.parse("\n".join(lines)).quotas == {"acme": Quota(3, 5, 2)}


LINE = f"sha256:{'a' * 64} tenant=acme"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("secret tenant=a", r"t:1: expected 'sha256:' and 64 hexadecimal digits"),
        ("sha256:" + "a" * 64, r"t:1: tenant='': letters, digits"),
        (f"{LINE} tenant=b", r"expected NAME=VALUE once"),
        (f"{LINE} rate", r"expected NAME=VALUE once for each name, got 'rate'"),
        (f"{LINE} rate=fast", r"rate must be a positive number, not 'fast'"),
        (f"{LINE} rate=0", r"rate must be a positive number"),
        (f"{LINE} burst=0.5", r"burst must be at least 1"),
        (f"{LINE} concurrency=1.5", r"concurrency must be a whole number"),
        (f"{LINE} model=a", r"unknown: model; there are"),
        (f"{LINE}\n\n{LINE}", r"t:3: this token is in the file already"),
    ],
)
def test_lines_that_are_wrong_say_where_and_why(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens.parse(line, "t")


@pytest.mark.parametrize(
    ("grant", "allowed", "forbidden"),
    [
        ("", ["/v1/read", "/v2/models/a/infer", "/v2/repository/models/a/load", "/metrics"], []),
        (
            "models=a,b-*",
            ["/v2/models/a/infer", "/v2/models/b-1/versions/2/infer", "/v2/models/a", "/v2", "/healthz"],
            ["/v2/models/ab/infer", "/v1/read", "/v2/repository/models/a/load", "/metrics", "/v2/models/"],
        ),
        ("paths=/v1/*", ["/v1/read", "/v2/models"], ["/v2/models/a/infer", "/v1", "/metrics"]),
        ("models=a paths=/metrics", ["/v2/models/a/infer", "/metrics"], ["/v1/read"]),
    ],
)
def test_what_a_token_opens(grant: str, allowed: list[str], forbidden: list[str]) -> None:
    (found,) = tokens.parse(f"{LINE} {grant}").grants.values()
    assert [path for path in allowed if not found.allows(path)] == []
    assert [path for path in forbidden if found.allows(path)] == []


# --- quotas -----------------------------------------------------------------------------------------------------------


def test_a_bucket_has_its_burst_and_then_its_rate(table: Table) -> None:
    row = table.row("acme")
    quota = Quota(rate=10, burst=3)
    assert [table.admit(row, quota, 100.0) for _ in range(4)] == [0, 0, 0, pytest.approx(0.1)]
    assert table.admit(row, quota, 100.05) == pytest.approx(0.05)
    assert table.admit(row, quota, 100.1) == 0
    assert table.admit(row, quota, 100.1) > 0
    # After a long time it is full again, and no fuller.
    assert [table.admit(row, quota, 200.0) > 0 for _ in range(4)] == [False, False, False, True]
    # Over a second exactly the rate gets through.
    admitted = sum(table.admit(row, quota, 300.0 + tick / 1000) == 0 for tick in range(10_000))
    assert admitted == 100 + 2


def test_requests_at_a_time_are_counted_over_all_processes_and_the_dead_are_forgotten() -> None:
    memory = quotas.make_memory()
    first, second = Table(memory, 0), Table(memory, 1)
    try:
        row = first.row("acme")
        assert second.row("acme") == row
        assert first.row("other") != row
        quota = Quota(concurrency=2)
        assert (first.admit(row, quota, 0), second.admit(row, quota, 0)) == (0, 0)
        assert (first.admit(row, quota, 0), second.admit(row, quota, 0)) == (1, 1)
        second.leave(row)
        assert second.admit(row, quota, 0) == 0
        first.forget(1)
        assert first.admit(row, quota, 0) == 0
    finally:
        first.close()
        second.close()
        os.close(memory)


def test_a_full_table_says_so(table: Table) -> None:
    for number in range(quotas.TENANTS_MAX):
        table.row(f"t{number}")
    assert table.row("t7") == table.row("t7")
    with pytest.raises(ValueError, match="more than 1024 tenants"):
        table.row("one more")


# --- both -------------------------------------------------------------------------------------------------------------


class Doors:
    def __init__(self, path: Path, table: Table) -> None:
        self.token, self.line = tokens.make("acme")
        self.path = path
        self.counter = Counter("c", "Requests.", ("tenant", "outcome"))
        path.write_text(f"{self.line} models=a rate=1 burst=2")
        self.access = Access(str(path), table, self.counter)

    def status(self, path: str, authorization: str | None = None) -> tuple[int, dict[str, str]]:
        given = f"Bearer {self.token}" if authorization is None else authorization
        try:
            self.access.leave(self.access.enter(given or None, path))
        except HttpError as error:
            return error.status, error.headers or {}
        return 200, {}


@pytest.fixture
def doors(tmp_path: Path, table: Table) -> Doors:
    return Doors(tmp_path / "tokens", table)


def test_who_is_let_in(doors: Doors) -> None:
    assert doors.status("/v2/models/a/infer") == (200, {})
    assert doors.status("/v2/models/b/infer")[0] == 403
    assert doors.status("/v2/models/a/infer", "") == (401, {"WWW-Authenticate": 'Bearer realm="rtml"'})
    status, headers = doors.status("/v2/models/a/infer", "Bearer wrong")
    assert (status, headers["WWW-Authenticate"]) == (401, 'Bearer realm="rtml", error="invalid_token"')
    assert doors.status("/healthz", "")[0] == 200
    assert doors.status("/metrics", "")[0] == 401
    assert doors.status("/v2/models/a/infer")[0] == 200
    status, headers = doors.status("/v2/models/a/infer")
    assert (status, headers) == (429, {"Retry-After": "1"})
    counted = {key: cell.value for key, cell in doors.counter.children.items()}
    assert counted == {
        ("acme", "admitted"): 2, ("acme", "forbidden"): 1, ("", "unauthorized"): 3, ("acme", "over_quota"): 1,
    }  # fmt: skip


def test_what_is_open_can_be_chosen(tmp_path: Path, table: Table) -> None:
    (tmp_path / "t").write_text("")
    counter = Counter("c", "Requests.", ("tenant", "outcome"))
    access = Access(str(tmp_path / "t"), table, counter, open_health=False, open_metrics=True)
    access.enter(None, "/metrics")
    with pytest.raises(HttpError):
        access.enter(None, "/healthz")


def test_a_file_is_read_again_and_a_wrong_one_changes_nothing(doors: Doors) -> None:
    other, line = tokens.make("beta")
    doors.path.write_text("nonsense")
    doors.access.reload()
    assert doors.status("/v2/models/a")[0] == 200
    doors.path.write_text(line)
    doors.access.reload()
    assert doors.status("/v2/models/a")[0] == 401
    assert doors.status("/v2/models/b", f"Bearer {other}")[0] == 200
    with pytest.raises(ValueError, match="cannot read the token file"):
        tokens.load(str(doors.path) + ".missing")
