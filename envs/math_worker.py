"""Compares mathematical expressions for math_grading.py, as a process run from this file.

A hostile expression can hang in C code, where no Python timeout reaches. So the timers kill the
process, and the parent sees by the signal whether processor time (SIGPROF) or the clock (SIGALRM)
ran out. The process also ends when its standard input closes. One JSON line in, one out:

    in:  {"seconds": 5.0, "patience": 20.0, "gold": "...", "answer": "..." or null}    null: only parse the gold
    out: {"gold": true, "equal": false}    "gold": it parsed; an answer that does not parse is not equal
"""

import contextlib
import json
import logging
import resource
import signal
import sys
from typing import Any

from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from math_verify import verify

MEMORY_BYTES = 4 * 2**30
NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)


def parse(expression: str) -> Any:
    """The whole text as a sympy object, or None. math_verify.parse would accept a part of it."""
    try:
        latex = normalize_latex(expression, config=NORMALIZATION)
        return latex2sympy(latex, is_real=True, convert_degrees=False, normalization_config=None)
    except MemoryError:
        raise
    except Exception:  # the parser raises bare Exception
        return None


def main() -> None:
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    with contextlib.suppress(ValueError):  # the limit here is lower; or macOS, which refuses any
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    replies, sys.stdout = sys.stdout, sys.stderr  # a library's prints are no replies
    verify(parse(r"\sqrt{2}"), parse("1"), timeout_seconds=None)  # the first takes longer, and is no answer's time
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        signal.setitimer(signal.ITIMER_REAL, request["seconds"] * request["patience"])
        gold = parse(request["gold"])
        answer = None if request["answer"] is None else parse(request["answer"])
        equal = False
        if gold is not None and answer is not None:
            equal = verify(gold, answer, timeout_seconds=None, raise_on_error=True)
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        print(json.dumps({"gold": gold is not None, "equal": bool(equal)}), file=replies, flush=True)


if __name__ == "__main__":
    main()
