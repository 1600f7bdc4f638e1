"""Open files: programs start with a limit of 1024 on many machines, and each connection and each pipe is one. A
server with more clients than that could write no checkpoint.
"""

import resource
from contextlib import suppress

MOST = 1 << 16
FOR_FILES = 256


def allow_open_files() -> None:
    """Raises this process's limit, and that of those it starts, as far as the machine lets it, to MOST."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(ValueError, OSError):  # macOS names no limit, and has one
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def most_connections() -> int:
    """What a server may have open, so that files can still be opened."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST if soft == resource.RLIM_INFINITY else soft
    return most - min(FOR_FILES, most // 2)
