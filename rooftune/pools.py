"""Threads of the parent that wait for workers, and what becomes of them at Ctrl-C."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from rooftune.lab import Lab


@contextlib.contextmanager
def asking(lab: Lab, most: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that ask workers. Ctrl-C does not wait for what they wait for: compilers had kept it for minutes."""
    with ThreadPoolExecutor(most) as threads:
        try:
            yield threads
        except KeyboardInterrupt:
            threads.shutdown(wait=False, cancel_futures=True)
            lab.halt()
            raise
