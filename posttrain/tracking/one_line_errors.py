"""The errors of a command: a line for what its user can mend, the user's own frames for an exception of
the user's code, a traceback for a bug."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

from posttrain.backend.errors import CookbookError
from posttrain.tracking.how_to_resume import how_to_resume
from posttrain.tracking.own_frames import called_by_a_loop, own_traceback
from posttrain.tracking.stop_request import silence

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, the largest file that is allowed (ulimit -f)


@dataclass
class Command:
    """`log_path`: where the whole of a shortened traceback goes."""

    log_path: str | None = None


@contextmanager
def one_line_errors() -> Iterator[Command]:
    """Turns a CookbookError, with its notes, and an OSError that names a file or a full disk, into
    one line and exit code 2.

    Ctrl-C exits with 130, a closed standard output with 141, an exception of the user's code
    (own_frames.py) with 1. Any other exception is a bug and keeps its traceback.
    """
    command = Command()
    try:
        yield command
        sys.stdout.flush()
    except CookbookError as error:
        texts = [str(error), *(f"({note})" for note in getattr(error, "__notes__", ()))]
        _leave(f"error: {' '.join(' '.join(texts).split())}", 2)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except BrokenPipeError:
        silence(sys.stdout)
        sys.exit(141)
    except OSError as error:
        if (text := _os_error_text(error)) is None:
            raise
        _leave(f"error: {text}", 2)
    except (Exception, SystemExit) as error:  # sys.exit(0) in an environment's code is no end of a run
        if isinstance(error, SystemExit) and not called_by_a_loop(error):
            raise
        if (text := own_traceback(error, command.log_path)) is None:
            raise
        _leave(text, 1)


def _leave(text: str, status: int) -> NoReturn:
    with suppress(OSError):  # the terminal may be gone
        print(text, file=sys.stderr, flush=True)
    sys.exit(status)


def _os_error_text(error: OSError) -> str | None:
    """None for errors that a user cannot fix: a socket, a process."""
    if error.errno in FULL:
        place = f"{error.filename}: " if error.filename else ""
        return (
            f"{place}{error.strerror}; what was saved before is whole. Free some space, or delete old checkpoints "
            f"(keep_checkpoints=2 keeps few); {how_to_resume()}"
        )
    if error.errno is not None and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}; check the path and its permissions, or choose another"
    return None
