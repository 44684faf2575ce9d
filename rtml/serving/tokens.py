"""Bearer tokens: the file that says whose they are, what they may be used for, and how much.

    # one token a line; the token itself is nowhere, only its SHA-256
    sha256:9f86d08... tenant=acme models=ocr-*,faces paths=/v1/read rate=100 burst=200 concurrency=8

Without `models` and `paths` a token opens everything; with one or both, what they name, and questions about the server.
`rate` are requests per second, `burst` how many may come at once, `concurrency` how many may be running; they are
shared by all tokens of a tenant, and the last line of a tenant that gives one counts.
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import math
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

_PREFIX: Final = "rtml_"
_SCHEME: Final = "bearer "
_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")
_TENANT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MODELS: Final = "/v2/models/"
#: Questions that any token may ask: what is here, and is it well.
_COMMON: Final = frozenset(
    ("/v2", "/v2/models", "/v2/health/live", "/v2/health/ready", "/healthz", "/readyz", "/openapi.json")
)


class Quota(NamedTuple):
    """What a tenant may use; None: as much as it likes."""

    #: Requests per second.
    rate: float | None = None
    #: Requests that may come at once when there were none for a while.
    burst: float | None = None
    #: Requests that may be running.
    concurrency: int | None = None


class Grant(NamedTuple):
    """What one token is good for."""

    digest: bytes
    tenant: str
    #: Patterns (`*` and `?`) of model names and of paths; empty both: everything.
    models: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()

    def allows(self, path: str) -> bool:
        """Whether a request for `path` may be made."""
        if not (self.models or self.paths) or path in _COMMON:
            return True
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in self.paths):
            return True
        if not path.startswith(_MODELS):
            return False
        model = path[len(_MODELS) :].partition("/")[0]
        return self.allows_model(model)

    def allows_model(self, name: str) -> bool:
        """Whether a model may be used, by whatever protocol."""
        if not (self.models or self.paths):
            return True
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.models)


class Tokens(NamedTuple):
    """The content of a token file."""

    grants: Mapping[bytes, Grant]
    quotas: Mapping[str, Quota]

    def find(self, authorization: str) -> Grant | None:
        """What the header `Authorization` opens; None: it is no known token."""
        if authorization[: len(_SCHEME)].lower() != _SCHEME:
            return None
        digest = digest_of(authorization[len(_SCHEME) :].strip())
        # The table is searched by hashes, of which a caller cannot choose the first bytes; the comparison of the whole
        # takes the same time wherever they differ.
        grant = self.grants.get(digest[:8], _NONE)
        return grant if hmac.compare_digest(grant.digest, digest) else None


_NONE: Final = Grant(bytes(32), "")


def digest_of(token: str) -> bytes:
    """What is kept of a token. It has 256 random bits, so a plain hash is enough: there is nothing to guess."""
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()


def make(tenant: str) -> tuple[str, str]:
    """A new token, and its line for the file.

    Raises:
        ValueError: the tenant's name cannot stand there.
    """
    _check_tenant(tenant)
    token = _PREFIX + secrets.token_urlsafe(32)
    return token, f"sha256:{digest_of(token).hex()} tenant={tenant}"


def load(path: str) -> Tokens:
    """Read a token file.

    Raises:
        ValueError: it cannot be read, or a line of it is wrong; the message says which and why.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the token file {path!r}: {error}") from None
    return parse(text, path)


def parse(text: str, path: str = "tokens") -> Tokens:
    """Understand a token file's text. Raises as `load`."""
    grants: dict[bytes, Grant] = {}
    quotas: dict[str, Quota] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            grant, quota = _parse_line(words)
            if grant.digest[:8] in grants:
                raise ValueError("this token is in the file already")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        grants[grant.digest[:8]] = grant
        known = quotas.get(grant.tenant, Quota())
        given = {name: value for name, value in quota._asdict().items() if value is not None}
        quotas[grant.tenant] = known._replace(**given)
    return Tokens(grants, quotas)


def _parse_line(words: list[str]) -> tuple[Grant, Quota]:
    found = _DIGEST.fullmatch(words[0])
    if found is None:
        raise ValueError("expected 'sha256:' and 64 hexadecimal digits first; `rtml tokens make TENANT` prints a line")
    fields: dict[str, str] = {}
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if not equals or not value or name in fields:
            raise ValueError(f"expected NAME=VALUE once for each name, got {word!r}")
        fields[name] = value
    tenant = fields.pop("tenant", "")
    _check_tenant(tenant)
    grant = Grant(bytes.fromhex(found[1]), tenant, _patterns(fields, "models"), _patterns(fields, "paths"))
    rate, burst, concurrency = (_amount(fields, name) for name in ("rate", "burst", "concurrency"))
    if fields:
        raise ValueError(f"unknown: {', '.join(fields)}; there are tenant, models, paths, rate, burst, concurrency")
    if concurrency is not None and concurrency != int(concurrency):
        raise ValueError("concurrency must be a whole number")
    if burst is not None and burst < 1:
        raise ValueError("burst must be at least 1")
    return grant, Quota(rate, burst, None if concurrency is None else int(concurrency))


def _check_tenant(tenant: str) -> None:
    if not _TENANT.fullmatch(tenant):
        raise ValueError(f"tenant={tenant!r}: letters, digits, '.', '_' and '-', at most 64 of them")


def _patterns(fields: dict[str, str], name: str) -> tuple[str, ...]:
    return tuple(part for part in fields.pop(name, "").split(",") if part)


def _amount(fields: dict[str, str], name: str) -> float | None:
    text = fields.pop(name, None)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, not {text!r}")
    return value
