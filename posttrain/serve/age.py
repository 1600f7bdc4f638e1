"""Exports whose files are encrypted, in the format of age (age-encryption.org/v1), to the keys of those
who may read them. Left out: age's plugins and passphrases.
"""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from posttrain.backend.atomic_folder import atomic_folder
from posttrain.backend.errors import CheckpointError
from posttrain.backend.extras import need
from posttrain.serve.body import BodyError

MOST_RECIPIENTS = 10


def read_recipients(written: Sequence[object]) -> list[Any]:
    """The public keys: "age1..." or those of SSH. BodyError for anything else."""
    if len(written) > MOST_RECIPIENTS:
        raise BodyError(f"age_encryption_recipients: {len(written)} of them; at most {MOST_RECIPIENTS} are allowed")
    if written:
        need("pyrage", "age_encryption_recipients")
    return [_public_key(str(text)) for text in written]


def _pyrage() -> Any:
    return import_module("pyrage")  # whose own types lack half of it


def _public_key(text: str) -> Any:
    pyrage = _pyrage()
    kind = pyrage.ssh if text.startswith("ssh-") else pyrage.x25519
    try:
        return kind.Recipient.from_str(text)
    except pyrage.RecipientError as error:
        raise BodyError(
            f"age_encryption_recipients: {text[:80]!r} is no public key, such as `age-keygen` prints (age1...): {error}"
        ) from error


def check_replaces(path: str, folder: Path, *, encrypted: bool) -> None:
    """CheckpointError where `folder` holds an export that is encrypted, and the new one is not, or the reverse."""
    there = any(folder.rglob("*.age"))
    if folder.exists() and there != encrypted:
        raise CheckpointError(
            f"{path} exists and is {'encrypted' if there else 'in plain'}, which the new one is not: choose another "
            "name, or delete it"
        )


async def save_encrypted(save: Callable[[str], Awaitable[object]], folder: Path, recipients: Sequence[Any]) -> None:
    """What `save` writes, in `folder`, each file encrypted and named FILE.age."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # a server that starts deletes .*.tmp, which one that was killed left
    with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder.parent) as plain:
        await save(f"{plain}/weights")
        await asyncio.to_thread(_encrypt, Path(plain, "weights"), folder, recipients)


def _encrypt(plain: Path, folder: Path, recipients: Sequence[Any]) -> None:
    pyrage = _pyrage()
    with atomic_folder(folder) as encrypted:
        for file in (file for file in plain.rglob("*") if file.is_file()):
            to = encrypted / f"{file.relative_to(plain)}.age"
            to.parent.mkdir(parents=True, exist_ok=True)
            pyrage.encrypt_file(str(file), str(to), recipients)
