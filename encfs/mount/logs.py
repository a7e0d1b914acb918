"""Where a daemon logs: stderr in the foreground, a bounded file in the background. Not here: what is logged."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from encfs.errors import StorageError

#: A log file is begun anew at this size (bytes); one older file is kept beside it.
_MAX_SIZE = 1 << 20
_FORMAT = "%(asctime)s %(levelname)s %(message)s"
_LOGGERS = ("encfs", "pyfuse3")


@contextmanager
def logging_to(path: Path | None) -> Iterator[None]:
    """Send this project's messages to a file, or to stderr where `path` is None and nobody has set up logging yet.

    Raises: StorageError where the file cannot be opened.
    """
    handler = _file_handler(path) if path else _stderr_handler()
    if handler is None:
        yield
        return
    handler.setFormatter(logging.Formatter(_FORMAT))
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
        handler.close()


def _file_handler(path: Path) -> logging.Handler:
    try:
        # Messages name the artifact: they are for this user only.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        return logging.handlers.RotatingFileHandler(
            path, maxBytes=_MAX_SIZE, backupCount=1, encoding="utf-8", errors="backslashreplace"
        )
    except OSError as error:
        raise StorageError(f"the log file {path} cannot be opened: {error.strerror}") from None


def _stderr_handler() -> logging.Handler | None:
    return None if logging.getLogger(_LOGGERS[0]).hasHandlers() else logging.StreamHandler(sys.stderr)
