"""`/openapi.json`, and `/docs`: the same for people. The page is one file that asks nobody but this gateway."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Final

import msgspec
from aiohttp import web

from rtml.serving import http, openapi
from rtml.serving.app import App
from rtml.serving.openapi import Described
from rtml.serving.registry import Registry

_PAGE_HEADERS: Final = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class DocRoutes:
    """Serves the document.

    Args:
        apps: What is served beside the protocol.
        registry: Knows the models.
        version: Of the server.
        secured: Bearer tokens are asked for.
    """

    def __init__(self, apps: Sequence[App], registry: Registry, version: str, *, secured: bool) -> None:
        self._apps = apps
        self._registry = registry
        self._version = version
        self._secured = secured
        self._made = b""
        self._generation = -1
        self._page = files("rtml.serving").joinpath("docs.html").read_bytes()

    def add_to(self, routes: http.Routes) -> None:
        """Serve both."""
        routes.add("GET", "/openapi.json", self._document)
        routes.add("GET", "/docs", self._show)

    async def _document(self, request: web.BaseRequest) -> web.Response:
        registry = self._registry
        if self._generation != registry.generation:
            self._generation = registry.generation
            models = [Described(registry.find(name), registry.versions(name)) for name in registry.names()]
            found = openapi.document(self._apps, models, self._version, secured=self._secured)
            self._made = msgspec.json.encode(found)
        return web.Response(body=self._made, content_type="application/json")

    async def _show(self, request: web.BaseRequest) -> web.Response:
        return web.Response(body=self._page, headers=_PAGE_HEADERS)
