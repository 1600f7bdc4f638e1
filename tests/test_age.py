"""Exports that are encrypted for clients, as weights.download of tinker-cookbook asks for them."""

from typing import Any

import pytest

pyrage: Any = pytest.importorskip("pyrage", reason="the serve extra is not installed")

from posttrain.serve.age import read_recipients  # noqa: E402
from posttrain.serve.body import BodyError  # noqa: E402
from posttrain.serve.state import State  # noqa: E402
from tests.test_serve import Http, app_test  # noqa: E402
from tests.test_serve import service as service  # noqa: E402 (the fixture)

KEYS = [pyrage.x25519.Identity.generate() for _ in range(2)]
RECIPIENTS = [str(key.to_public()) for key in KEYS]
SSH = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIK8ebuOYJueUZZED1rcfdTT8zyV/EOVqTOZbfBXz/AVm"


@pytest.mark.parametrize(
    "written",
    ["age1", "", 5, "ssh-ed25519 AAAA", RECIPIENTS[0][:-1], RECIPIENTS[0] + "q", "\u0131" * 62],
    ids=["short", "empty", "number", "short of ssh", "cut off", "longer", "no letters"],  # keys differ in each process
)
def test_what_is_no_key_is_refused(written: object) -> None:
    with pytest.raises(BodyError, match="age-keygen"):
        read_recipients([RECIPIENTS[0], written])
    with pytest.raises(BodyError, match="at most 10"):
        read_recipients(RECIPIENTS[:1] * 11)
    assert len(read_recipients([*RECIPIENTS, SSH])) == 3


@app_test
async def test_an_export_is_encrypted_whole_and_leaves_nothing_in_plain(http: Http, state: State) -> None:
    model_id = await http.model(rank=4)
    wanted = {"model_id": model_id, "path": "out", "age_encryption_recipients": RECIPIENTS}
    saved = await http.call("save_weights_external", seq_id=1, **wanted)
    assert (await http.result(saved)).json()["path"] == f"tinker://{model_id}/external_weights/out"
    saved = await http.call("save_weights_external", seq_id=2, model_id=model_id, path="plain")
    await http.result(saved)
    place = f"training_runs/{model_id}/checkpoints/external_weights"
    plain = (await http.call(f"{place}/plain/external_weights_urls", "GET")).json()["urls"]
    urls = (await http.call(f"{place}/out/external_weights_urls", "GET")).json()["urls"]
    assert {name.removesuffix(".age") for name in urls} == {*plain} and all(name.endswith(".age") for name in urls)
    for name, url in plain.items():
        encrypted, whole = [(await http._client.get(address)).content for address in (urls[f"{name}.age"], url)]
        assert all(pyrage.decrypt(encrypted, [key]) == whole for key in KEYS)
    folder = state.store.find(f"tinker://{model_id}/external_weights/out").folder
    assert {path.name for path in folder.parent.iterdir()} == {"out", "out.json", "plain", "plain.json"}
    for seq_id, fields in ((3, wanted | {"path": "plain"}), (4, {"model_id": model_id, "path": "out"})):
        refused = await http.result(await http.call("save_weights_external", seq_id=seq_id, **fields))
        assert "which the new one is not: choose another name, or delete it" in refused.json()["error"]
    refused = await http.call("save_weights", seq_id=5, **wanted)
    assert refused.status_code == 400 and "save_weights_external" in refused.json()["detail"]
