"""Models of the Hugging Face hub, OWNER/NAME or OWNER/NAME@REVISION: their files in the local cache,
and one line for what went wrong on the way. Left out: files in subfolders of a repository.
"""

import functools
import time
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from posttrain.backend.checkpoint_files import ADAPTER_CONFIG_FILE
from posttrain.backend.errors import ModelError, one_line

SETTINGS = ["*.json", "*.txt", "*.model", "*.jinja"]  # and the tokenizer
WEIGHTS = ["*.safetensors"]
OLDER_WEIGHTS = ["pytorch_model*.bin", "adapter_model.bin"]
IGNORED = ["*/*", "consolidated*"]  # the latter is a second copy of Mistral's weights
WAITS = (1, 3)  # seconds before another try, where that may well succeed
PASSING = {"ReadTimeout", "ConnectTimeout", "ReadError"}
UNREACHED = {
    "LocalEntryNotFoundError",
    "IncompleteSnapshotError",
    "OfflineModeIsEnabled",
    "ConnectError",
    "ConnectionError",
}
NO_FILE = "its repository lacks a file that is needed, such as config.json"
NOT_REACHED = "the Hugging Face hub was not reached (is HF_HUB_OFFLINE set?)"


@functools.cache
def hub_folder(name: str, weights: bool = False) -> Path:
    """A model's folder in the local cache, with settings and tokenizer, and with `weights` those
    too; what is missing is downloaded. ModelError with the reason where that fails."""
    folder = _settings_folder(name)
    # of a repository with an adapter, the weights tell whether there is a whole model besides
    if weights or (folder / ADAPTER_CONFIG_FILE).exists():
        _download(name, folder.name, WEIGHTS)
        if not any(folder.glob("*.safetensors")):
            _download(name, folder.name, OLDER_WEIGHTS)
    return folder


@functools.cache
def _settings_folder(name: str) -> Path:
    """The only look-up of a branch in this process: all files are of one commit, the folder's name."""
    folder = _download(name, name.partition("@")[2] or None, SETTINGS)
    if not folder.is_dir():
        raise ModelError(f"{name!r} cannot be opened: {NO_FILE}")
    return folder


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    repository, waits = name.partition("@")[0], [*WAITS]
    while True:
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    repository, revision=revision, allow_patterns=patterns, ignore_patterns=IGNORED
                )
            )
        except Exception as error:  # the hub's own, and those of its HTTP library
            if not waits or not _may_pass(error):
                raise ModelError(f"{name!r} cannot be opened: {hub_reason(error)}") from error
            time.sleep(waits.pop(0))


def hub_is_reached() -> bool:
    """Whether it answers at all; a data set is then read from the cache at once, without retries."""
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of any HTTP library
        return False
    return True


def hub_reason(error: BaseException, otherwise: str | None = None, reading: bool = True) -> str:
    """One line on what was read, or with `reading` False written. `otherwise` where the hub is not
    the reason. Libraries chain its error to a page of advice."""
    kinds, status = {type(link).__name__ for link in _chain(error)}, _status(error)
    if "GatedRepoError" in kinds or "is a gated dataset" in str(error):
        return "its repository is gated: accept its terms on huggingface.co, then log in with `hf auth login`, or set HF_TOKEN"
    if kinds & {"RepositoryNotFoundError", "HFValidationError", "DatasetNotFoundError"}:
        return (
            "the Hugging Face hub has no public repository of this name; for a private one log in with `hf auth login`"
        )
    if "RevisionNotFoundError" in kinds:
        return "its repository has no branch, tag or commit of this name"
    if kinds & {"RemoteEntryNotFoundError", "EntryNotFoundError"}:
        return NO_FILE
    if "LocalTokenNotFoundError" in kinds or status == 401:
        return "the Hugging Face hub needs a login: `hf auth login`, or set HF_TOKEN"
    if status is not None and status >= 400:
        later = "; try again later" if _may_pass(error) else ""
        return f"the Hugging Face hub answered with the error {status}{later}"
    if kinds & {*PASSING, "RemoteProtocolError"} or "Consistency check failed" in str(error):
        return "the download from the Hugging Face hub was interrupted: the same command goes on from there"
    if kinds & UNREACHED:
        return f"it is not, or not whole, in the local cache, and {NOT_REACHED}" if reading else NOT_REACHED
    return otherwise or f"{type(error).__name__}: {one_line(error, 300)}"


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return any(type(link).__name__ in PASSING for link in _chain(error))


def _status(error: BaseException) -> int | None:
    """Of the response that an error of the chain carries."""
    responses = (getattr(link, "response", None) for link in _chain(error))
    return next((response.status_code for response in responses if response is not None), None)


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain
