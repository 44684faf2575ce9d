"""The HTTP gateway: models by the Open Inference Protocol, graph programs as typed endpoints.

`App` says what is served; it is all that an application imports, and it imports no web server, because executors
import the application's module too. `rtml.serving.gateway` serves apps; `python -m rtml serve module:app` runs it.
"""

from typing import TYPE_CHECKING, Any

from rtml.serving.app import App

if TYPE_CHECKING:
    from rtml.serving.sequencespec import SequenceSpec


def __getattr__(name: str) -> Any:
    if name == "SequenceSpec":  # what an app without state need not import
        from rtml.serving.sequencespec import SequenceSpec

        return SequenceSpec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["App", "SequenceSpec"]
