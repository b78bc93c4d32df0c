"""TLS settings as redis-py has them, with files that may be renewed while we run."""

from __future__ import annotations

import contextlib
import copy
import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class TLS:
    """Makes TLS contexts: a new one after a file has changed. May be shared between threads.

    Compared and hashed by identity, as a part of an `Endpoint`.
    """

    def __init__(self, settings: Any) -> None:
        self._settings = settings  # redis-py's RedisSSLContext
        self._made: tuple[list[Any], ssl.SSLContext] | None = None

    def context(self) -> ssl.SSLContext:
        """For the next connection. Raises `OSError` or `ValueError` for files that can't be."""
        files = list(self._files())  # before they are read: what changes meanwhile is read again
        made = self._made
        if made is None or made[0] != files:
            settings = copy.copy(self._settings)  # which remembers what it has made
            settings.context = None
            made = self._made = (files, settings.get())
        return made[1]

    def _files(self) -> Iterator[Any]:
        names = [getattr(self._settings, name) for name in ("certfile", "keyfile", "ca_certs")]
        names.append(ssl.get_default_verify_paths().cafile)
        folder = getattr(self._settings, "ca_path", None)
        if folder:
            with contextlib.suppress(OSError):
                names += sorted(entry.path for entry in os.scandir(folder))
        for name in filter(None, names):
            with contextlib.suppress(OSError):  # reading it will say what is wrong
                seen = Path(name).stat()
                yield name, seen.st_mtime_ns, seen.st_size, seen.st_ino
