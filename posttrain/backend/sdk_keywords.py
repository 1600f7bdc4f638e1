"""Keywords of the Tinker SDK that have a meaning only for a hosted service."""

_printed: set[str] = set()


def say_once(line: str) -> None:
    """Prints the line, once per process."""
    if line not in _printed:
        _printed.add(line)
        print(line, flush=True)


def ignore(**given: object) -> None:
    """Prints, for each keyword that is neither None nor False, that it is ignored."""
    for name, value in given.items():
        if value is not None and value is not False:
            say_once(f"{name}= is accepted and ignored: it has no meaning on your own machine")
