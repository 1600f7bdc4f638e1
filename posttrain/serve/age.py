"""Files encrypted as age does (age-encryption.org/v1), for those who hold the key of an X25519
recipient. SSH keys and plugins are left out.
"""

import asyncio
import hmac
import secrets
import tempfile
from base64 import b64encode
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from posttrain.backend.atomic_folder import atomic_folder
from posttrain.backend.extras import need
from posttrain.serve.body import BodyError

MOST_RECIPIENTS = 10
CHUNK = 64 * 1024
X25519 = b"age-encryption.org/v1/X25519"
DIGITS = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"  # of 5 bits each
GENERATOR = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)


def read_recipients(written: Sequence[object]) -> list[bytes]:
    """The public keys in "age1..." (Bech32). BodyError for anything else."""
    if len(written) > MOST_RECIPIENTS:
        raise BodyError(f"age_encryption_recipients: {len(written)} of them; at most {MOST_RECIPIENTS} are allowed")
    if written:
        need("cryptography", "age_encryption_recipients")
    return [_public_key(str(text)) for text in written]


def _public_key(text: str) -> bytes:
    digits = [DIGITS.find(character) for character in text.removeprefix("age1")]
    # 52 digits of the key and 6 of the checksum
    whole = text.startswith("age1") and len(digits) == 58 and -1 not in digits and _checksum(digits) == 1
    bits = sum(digit << 5 * i for i, digit in enumerate(reversed(digits[:52]))) if whole else 1
    if bits % 16:  # 260 bits: a key's 256, and 4 of nothing
        raise BodyError(
            f"age_encryption_recipients: {text[:80]!r} is no key that `age-keygen` prints (age1...); keys of SSH are "
            "not read here"
        )
    return (bits >> 4).to_bytes(32, "big")


def _checksum(digits: Sequence[int]) -> int:
    """1 if the last six digits belong to the others."""
    value = 1
    for digit in (*(ord(c) >> 5 for c in "age"), 0, *(ord(c) & 31 for c in "age"), *digits):
        top, value = value >> 25, (value & 0x1FFFFFF) << 5 ^ digit
        for i, term in enumerate(GENERATOR):
            value ^= term if top >> i & 1 else 0
    return value


async def save_encrypted(save: Callable[[str], Awaitable[object]], folder: Path, recipients: Sequence[bytes]) -> None:
    """What `save` writes, in `folder`, each file encrypted and named FILE.age."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # a server that starts deletes .*.tmp, which one that was killed left
    with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder.parent) as plain:
        await save(f"{plain}/weights")
        await asyncio.to_thread(_encrypt_folder, Path(plain, "weights"), folder, recipients)


def _encrypt_folder(plain: Path, folder: Path, recipients: Sequence[bytes]) -> None:
    with atomic_folder(folder) as encrypted:
        for file in (file for file in plain.rglob("*") if file.is_file()):
            to = encrypted / f"{file.relative_to(plain)}.age"
            to.parent.mkdir(parents=True, exist_ok=True)
            with file.open("rb") as source, to.open("wb") as target:
                encrypt(source, target, recipients)


def encrypt(source: BinaryIO, target: BinaryIO, recipients: Sequence[bytes]) -> None:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    file_key, nonce = secrets.token_bytes(16), secrets.token_bytes(16)
    header = b"age-encryption.org/v1\n" + b"".join(_stanza(file_key, recipient) for recipient in recipients) + b"---"
    mac = hmac.digest(_derived(file_key, b"", b"header"), header, "sha256")
    target.write(header + b" " + _base64(mac) + b"\n" + nonce)
    cipher = ChaCha20Poly1305(_derived(file_key, nonce, b"payload"))
    chunk, number = source.read(CHUNK), 0
    while True:
        following = source.read(CHUNK)
        target.write(cipher.encrypt(number.to_bytes(11, "big") + bytes([not following]), chunk, None))
        if not following:
            return
        chunk, number = following, number + 1


def _stanza(file_key: bytes, recipient: bytes) -> bytes:
    """The file's key for one recipient."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    ours = X25519PrivateKey.generate()
    share = ours.public_key().public_bytes_raw()
    key = _derived(ours.exchange(X25519PublicKey.from_public_bytes(recipient)), share + recipient, X25519)
    wrapped = ChaCha20Poly1305(key).encrypt(bytes(12), file_key, None)
    return b"-> X25519 " + _base64(share) + b"\n" + _base64(wrapped) + b"\n"


def _derived(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """32 bytes of HKDF-SHA256."""
    key = hmac.digest(salt or bytes(32), secret, "sha256")
    return hmac.digest(key, info + b"\x01", "sha256")


def _base64(content: bytes) -> bytes:
    return b64encode(content).rstrip(b"=")
