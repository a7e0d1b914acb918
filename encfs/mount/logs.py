"""Where a daemon logs: stderr in the foreground, a bounded file in the background. Not here: what is logged."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path

from encfs.errors import StorageError
from encfs.mount.options import LogFormat

#: A log file is begun anew at this size (bytes); one older file is kept beside it.
_MAX_SIZE = 1 << 20
_FORMAT = "%(asctime)s %(levelname)s %(message)s"
_LOGGERS = ("encfs", "pyfuse3")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (RFC 3339), `level`, `logger`, `message`, and what an audit line says."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if isinstance(audit := getattr(record, "audit", None), dict):
            document["audit"] = audit
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document)


@contextmanager
def logging_to(path: Path | None, log_format: LogFormat = "text") -> Iterator[None]:
    """Send this project's messages to a file, or to stderr where `path` is None and nobody has set up logging yet.

    Raises: StorageError where the file cannot be opened.
    """
    if path is not None:
        handler: logging.Handler | None = _file_handler(path)
    elif log_format == "json":
        # Whoever collects these lines wants nothing else on the stream.
        handler = logging.StreamHandler(sys.stderr)
        for name in _LOGGERS:
            logging.getLogger(name).handlers.clear()
    else:
        handler = _stderr_handler()
    handlers = [] if handler is None else [handler]
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        for one in handlers:
            one.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(_FORMAT))
            logger.addHandler(one)
        # What a service did is to be found later, its audit lines above all; a command only warns.
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in before:
            for one in handlers:
                logger.removeHandler(one)
            logger.setLevel(level)
        for one in handlers:
            one.close()


class _PrivateFileHandler(logging.handlers.RotatingFileHandler):
    """Messages name the artifact: each file, the later ones too, is for this user only, and no link is followed."""

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding=self.encoding, errors=self.errors, opener=_open_private)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _file_handler(path: Path) -> logging.Handler:
    try:
        return _PrivateFileHandler(path, maxBytes=_MAX_SIZE, backupCount=1, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise StorageError(f"the log file {path} cannot be opened: {error.strerror}") from None


def _stderr_handler() -> logging.Handler | None:
    return None if logging.getLogger(_LOGGERS[0]).hasHandlers() else logging.StreamHandler(sys.stderr)
