"""Keeps what is imported from the garbage collector in every process of the suite."""

import gc

FREEZE, UNFREEZE = gc.freeze, gc.unfreeze


def freeze_for_good() -> None:
    """vLLM would thaw the heap when an engine ends, and visit all of it eight times for each engine:
    half of the time of a test of one. So its calls do nothing."""
    FREEZE()
    gc.freeze = gc.unfreeze = lambda: None
