"""The HTTP gateway: models by the Open Inference Protocol, graph programs as typed endpoints.

`App` says what is served; it is all that an application imports, and it imports no web server, because executors
import the application's module too. `rtml.serving.gateway` serves apps; `python -m rtml serve module:app` runs it.
"""

from rtml.serving.app import App

__all__ = ["App"]
