"""The errors a user can act on. Command lines print one line and exit 2; all others are bugs."""


class CookbookError(Exception):
    """Says what is wrong, where, and what to do."""


class ConfigError(CookbookError):
    """An option is unknown, misspelt, or contradicts another."""


class DataError(CookbookError):
    """A dataset is missing, malformed, or has nothing to train on. Names file and line if known."""


class ModelError(CookbookError):
    """A model cannot be found, loaded, or used this way."""


class ContextLengthError(CookbookError):
    """A prompt, or a prompt plus the tokens to be sampled, does not fit the model's context."""


class CheckpointError(CookbookError):
    """A checkpoint cannot be written or does not fit this model. The previous one is unchanged."""


class NonFiniteError(CookbookError):
    """A loss or gradient is not finite. No weight was changed. `datum_indices`: offending data."""

    def __init__(self, message: str, datum_indices: list[int] | None = None):
        super().__init__(message)
        self.datum_indices = datum_indices or []


class LogprobGapError(CookbookError):
    """An alarm stopped the run (alarms.py): two computations of the same logprobs differ by more
    than rounding. Nothing was saved since."""


class OutOfMemoryError(CookbookError):
    """The device's memory was too small for a pass or a step. Nothing was saved since."""


class PassCancelledError(CookbookError):
    """A forward_backward was cancelled before its turn: the step's gradient is incomplete, no
    weight was changed."""


class StaleSamplerError(CookbookError):
    """The weights of a sampling client that was asked for with keep=False were replaced by a later
    sync."""


class SnapshotMemoryError(CookbookError):
    """The weights of a sampling client would exceed backend.snapshot_memory_gb."""


class EngineError(CookbookError):
    """The sampling engine died or was shut down; the cause is chained."""


class TrainerLostError(CookbookError):
    """A training process died. The last checkpoint stands; a resumed run goes on from it."""


class ClosedError(CookbookError):
    """A client was closed before this call began."""


def one_line(error: object, most_chars: int | None = None) -> str:
    """The text of a library's error, for the one line of ours."""
    return " ".join(str(error).split())[:most_chars]


# --- the names of the Tinker SDK, for the `except` clauses of scripts written for it ------------

TinkerError = RequestFailedError = CookbookError


class APIError(CookbookError):
    """An error of a remote service. Never raised here."""


APIStatusError = APIConnectionError = APITimeoutError = APIResponseValidationError = APIError
BadRequestError = AuthenticationError = BillingError = PermissionDeniedError = NotFoundError = APIError
ConflictError = UnprocessableEntityError = RateLimitError = InternalServerError = APIError
