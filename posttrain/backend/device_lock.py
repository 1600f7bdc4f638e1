"""A lock of the process: starting or closing a vLLM engine excludes all other computing. An
allocation by another thread breaks vLLM's recording of CUDA graphs; closing the last engine ends
vLLM's global state; building a model of transformers' classes changes them. Your GPU code beside a
run goes inside `with computing():`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Seconds that newcomers let a waiting engine go first; limited, as a pass may wait for another
# thread's pass (a loss that calls a second model).
GIVE_WAY_SECONDS = 10.0

_changed = threading.Condition()
_computing = 0  # threads that compute
_waiting = 0  # threads that wait to be alone
_held_alone = False


@contextmanager
def computing() -> Iterator[None]:
    """Shared with other computing threads; waits while an engine starts or closes. May be nested."""
    global _computing
    with _changed:
        _changed.wait_for(lambda: not _waiting, timeout=GIVE_WAY_SECONDS)
        _changed.wait_for(lambda: not _held_alone)
        _computing += 1
    try:
        yield
    finally:
        with _changed:
            _computing -= 1
            _changed.notify_all()


@contextmanager
def alone() -> Iterator[None]:
    """Excludes all computing. Inside a pass it would wait for itself."""
    global _held_alone, _waiting
    with _changed:
        _waiting += 1
        _changed.wait_for(lambda: not _computing and not _held_alone)
        _waiting -= 1
        _held_alone = True
    try:
        yield
    finally:
        with _changed:
            _held_alone = False
            _changed.notify_all()
