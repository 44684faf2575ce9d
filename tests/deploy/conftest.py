"""The real helm, in both versions. If it cannot be had, tests fail and say so: the chart would be untested."""

from __future__ import annotations

import pytest

from tests.deploy.helm import SOURCES, Helm, HelmMissing


def _helm(version: str, home: pytest.TempPathFactory) -> Helm:
    try:
        return Helm(version, home.mktemp(f"helm-{version}"))
    except HelmMissing as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """The newest one."""
    return _helm(next(iter(SOURCES)), tmp_path_factory)


@pytest.fixture(scope="session", params=SOURCES)
def each_helm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """One after the other."""
    return _helm(request.param, tmp_path_factory)
