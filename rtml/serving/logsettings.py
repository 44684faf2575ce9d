"""What the gateway logs, changed while it runs: the logging extension.

Severities are switched on and off, `log_verbose_level` above 0 shows what is for debugging. Where the log goes is the
operator's matter: `log_file` cannot be changed.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from rtml.errors import InvalidInput

_SWITCHES: Final = {"log_info": logging.INFO, "log_warning": logging.WARNING, "log_error": logging.ERROR}
_FORMATS: Final = ("default", "ISO8601")
_ISO_FORMAT: Final = logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s", "%Y-%m-%dT%H:%M:%S%z")
_LOGGER: Final = "rtml"


class LogSettings(logging.Filter):
    """Lets pass what is switched on. Between `open` and `close` it filters what the root logger's handlers show."""

    def __init__(self) -> None:
        super().__init__()
        self._settings: dict[str, Any] = {**dict.fromkeys(_SWITCHES, True), "log_verbose_level": 0}
        self._settings["log_format"] = _FORMATS[0]
        self._handlers: list[tuple[logging.Handler, logging.Formatter | None]] = []
        self._level = logging.NOTSET

    def open(self) -> None:
        """Begin to filter."""
        self._level = logging.getLogger(_LOGGER).level
        for handler in logging.getLogger().handlers:
            self._handlers.append((handler, handler.formatter))
            handler.addFilter(self)

    def close(self) -> None:
        """Leave everything as it was found."""
        for handler, formatter in self._handlers:
            handler.removeFilter(self)
            handler.setFormatter(formatter)
        self._handlers = []
        logging.getLogger(_LOGGER).setLevel(self._level)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        for switch, level in _SWITCHES.items():
            if level <= record.levelno < level + 10 and not self._settings[switch]:
                return False
        return True

    def settings(self) -> dict[str, Any]:
        """What holds now."""
        return {"log_file": "", **self._settings}

    def change(self, wanted: dict[str, Any]) -> None:
        """Change settings.

        Args:
            wanted: Name -> value.

        Raises:
            InvalidInput: a setting is unknown or impossible; nothing is changed then.
        """
        for name, value in wanted.items():
            if name in _SWITCHES:
                fits, expected = isinstance(value, bool), "true or false"
            elif name == "log_verbose_level":
                fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
                expected = "a whole number from 0 on"
            elif name == "log_format":
                fits, expected = value in _FORMATS, " or ".join(_FORMATS)
            elif name == "log_file":
                fits, expected = value == "", "left alone: where the log goes is for the operator to say"
            else:
                known = ", ".join(self._settings)
                raise InvalidInput(f"there is no log setting {name[:40]!r}; there are {known}")
            if not fits:
                raise InvalidInput(f"{name} must be {expected}, not {repr(value)[:40]}")
        self._settings |= {name: value for name, value in wanted.items() if name != "log_file"}
        verbose = self._settings["log_verbose_level"] > 0
        logging.getLogger(_LOGGER).setLevel(logging.DEBUG if verbose else self._level)
        for handler, formatter in self._handlers:
            handler.setFormatter(formatter if self._settings["log_format"] == _FORMATS[0] else _ISO_FORMAT)
