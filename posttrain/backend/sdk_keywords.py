"""Keywords of the Tinker SDK that mean something to a hosted service and nothing on one's own
machine.
"""

_printed: set[str] = set()


def say_once(line: str) -> None:
    """Prints the line, once per process."""
    if line not in _printed:
        _printed.add(line)
        print(line, flush=True)


def ignore(**given: object) -> None:
    """Says of each keyword that was given (is not None or False) that it is ignored."""
    for name, value in given.items():
        if value is not None and value is not False:
            say_once(f"{name}= is accepted and ignored: it has no meaning on your own machine")
