"""Schemathesis asks a real gateway, with an engine and a model repository, for all that its document says.

A document of everything that can be in one is asked for in tests/integration/test_openapi.py.
"""

from __future__ import annotations

import pytest
from schemathesis import GenerationMode

from tests.conformance.conftest import Gateway
from tests.integration.test_openapi import MODES, ask_for_everything

pytestmark = pytest.mark.whole


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_every_answer_is_one_that_the_document_knows(gateway: Gateway, mode: GenerationMode) -> None:
    assert ask_for_everything(f"http://127.0.0.1:{gateway.port}", mode, 10) > 300
