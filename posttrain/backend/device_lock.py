"""One lock for the process: starting and closing a vLLM engine excludes all other computing.

While vLLM records CUDA graphs, an allocation by another thread breaks the recording or that thread.
Closing the last engine ends vLLM's global state; building a model from transformers' classes
changes them. GPU code of yours beside a run goes inside `with computing():`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Seconds that newcomers let a waiting engine go first. Not for ever: a pass may wait for another
# thread's pass (a loss that asks a second model).
GIVE_WAY_SECONDS = 10.0

_changed = threading.Condition()
_computing = 0  # how many compute
_waiting = 0  # how many want to be alone
_held_alone = False


@contextmanager
def computing() -> Iterator[None]:
    """Together with all others that compute; waits while an engine starts or closes. May be
    nested.
    """
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
    """Nobody else computes meanwhile. Not to be entered from inside a pass: that would wait for
    itself.
    """
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
