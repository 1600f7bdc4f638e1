"""The process that compares mathematical expressions: one JSON line in, one out. Started by
math_grading.py, run as a plain file.

A hostile expression can hang inside C code, where no Python timeout reaches. So the timers keep
their default action and kill the process; the parent sees the pipe close, and by the signal whether
processor time (SIGPROF) or the clock (SIGALRM) ran out. It also ends when its standard input
closes, so no orphan stays behind.

in:  {"seconds": 5.0, "patience": 20.0, "gold": "...", "answer": "..." or null}    null asks only whether the gold can be parsed
out: {"gold": true, "equal": false}    "gold" says whether it parsed; an answer that does not parse is not equal
"""

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
    """The whole text as one sympy object, or None. math_verify.parse would take any part of it that
    it understands.
    """
    try:
        latex = normalize_latex(expression, config=NORMALIZATION)
        return latex2sympy(latex, is_real=True, convert_degrees=False, normalization_config=None)
    except MemoryError:
        raise
    except Exception:  # the parser raises bare Exception
        return None


def main() -> None:
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no reply
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
