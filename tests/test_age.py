"""Exports that are encrypted for clients: read here as the age format's specification says, with
the key derivation of another library.
"""

import io
import os
from base64 import b64decode

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from posttrain.serve.age import CHUNK, encrypt, read_recipients
from posttrain.serve.body import BodyError
from posttrain.serve.state import State
from tests.test_serve import Http, app_test
from tests.test_serve import service as service  # the fixture

# a pair of age's own
SECRET = bytes.fromhex("79bfdecca38a8e131082d815225aedd14579ca36d56cb32a092ec74cf4757adb")
RECIPIENT = "age15heqk3se99pl3ukj5md0lv7awpttekxg4ae7x58tghgatsjw2uzs2yxgx0"


def _derived(secret: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt, info).derive(secret)


def _base64(text: bytes) -> bytes:
    return b64decode(text + b"=" * (-len(text) % 4))


def decrypted(content: bytes, secret: X25519PrivateKey) -> bytes:
    public, file_key = secret.public_key().public_bytes_raw(), b""
    header, _, rest = content.partition(b"\n--- ")
    mac, _, payload = rest.partition(b"\n")
    version, *lines = header.split(b"\n")
    assert version == b"age-encryption.org/v1"
    for stanza, wrapped in zip(lines[::2], lines[1::2], strict=True):
        kind, share = stanza.removeprefix(b"-> ").split(b" ")
        shared = secret.exchange(X25519PublicKey.from_public_bytes(_base64(share)))
        key = _derived(shared, _base64(share) + public, b"age-encryption.org/v1/" + kind)
        try:
            file_key = ChaCha20Poly1305(key).decrypt(bytes(12), _base64(wrapped), None)
        except Exception:  # of another recipient
            continue
    signed = HMAC(_derived(file_key, b"", b"header"), SHA256())
    signed.update(header + b"\n---")
    signed.verify(_base64(mac))
    cipher, body, plain = ChaCha20Poly1305(_derived(file_key, payload[:16], b"payload")), payload[16:], b""
    chunks = [body[i : i + CHUNK + 16] for i in range(0, len(body), CHUNK + 16)]
    for number, chunk in enumerate(chunks):
        last = number == len(chunks) - 1
        plain += cipher.decrypt(number.to_bytes(11, "big") + bytes([last]), chunk, None)
    return plain


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_each_recipient_reads_the_file(size: int) -> None:
    text, file = os.urandom(size), io.BytesIO()
    other = X25519PrivateKey.generate()
    encrypt(io.BytesIO(text), file, [other.public_key().public_bytes_raw(), *read_recipients([RECIPIENT])])
    for secret in (X25519PrivateKey.from_private_bytes(SECRET), other):
        assert decrypted(file.getvalue(), secret) == text


@pytest.mark.parametrize(
    "written",
    ["age1", "", 5, "ssh-ed25519 AAAA", RECIPIENT[:-1], RECIPIENT + "q", RECIPIENT.replace("h", "q", 1), "\u0131" * 62],
)
def test_what_is_no_key_is_refused(written: object) -> None:
    with pytest.raises(BodyError, match="age-keygen"):
        read_recipients([RECIPIENT, written])
    with pytest.raises(BodyError, match="at most 10"):
        read_recipients([RECIPIENT] * 11)


# As weights.download of tinker-cookbook asks for them.
@app_test
async def test_an_export_is_encrypted_whole_and_leaves_nothing_in_plain(http: Http, state: State) -> None:
    model_id = await http.model(rank=4)
    wanted = {"model_id": model_id, "path": "out", "age_encryption_recipients": [RECIPIENT]}
    saved = await http.call("save_weights_external", seq_id=1, **wanted)
    assert (await http.result(saved)).json()["path"] == f"tinker://{model_id}/external_weights/out"
    saved = await http.call("save_weights_external", seq_id=2, model_id=model_id, path="plain")
    await http.result(saved)
    place = f"training_runs/{model_id}/checkpoints/external_weights"
    plain = (await http.call(f"{place}/plain/external_weights_urls", "GET")).json()["urls"]
    urls = (await http.call(f"{place}/out/external_weights_urls", "GET")).json()["urls"]
    assert {name.removesuffix(".age") for name in urls} == {*plain} and all(name.endswith(".age") for name in urls)
    secret = X25519PrivateKey.from_private_bytes(SECRET)
    for name, url in plain.items():
        fetched = [(await http._client.get(address)).content for address in (urls[f"{name}.age"], url)]
        assert decrypted(fetched[0], secret) == fetched[1]
    folder = state.store.find(f"tinker://{model_id}/external_weights/out").folder
    assert {path.name for path in folder.parent.iterdir()} == {"out", "out.json", "plain", "plain.json"}
    refused = await http.call("save_weights", seq_id=3, **wanted)
    assert refused.status_code == 400 and "save_weights_external" in refused.json()["detail"]
