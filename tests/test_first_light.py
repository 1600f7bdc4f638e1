"""First light: aims and their verdicts, ratios, and what only a GPU's blocks do, with a stand-in."""

import copy
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from benchmarks.gpu import first_light, large_models, learning, sampling, train_step, warm_start
from benchmarks.gpu.aims import AIMS, Aim, table
from benchmarks.gpu.checks import Record
from benchmarks.gpu.data import VOCABULARY
from benchmarks.gpu.half_b_engine import TRAINED_ON, check_stop_string_of_trained, loads
from benchmarks.gpu.sampling import FIRST, MORE, in_order, summary
from benchmarks.gpu.small_engines import repeated
from posttrain.backend import vllm_weights
from posttrain.backend.config import BackendConfig
from posttrain.backend.models import PRESETS
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import SamplingParams
from posttrain.backend.vllm_copies import record
from posttrain.tracking.run_folder import RunFolder
from tests.pretend_gpu import pretend_gpu
from tests.processes import wait_until
from tests.test_vllm_copies import Loaded, random


def test_an_aim_is_reached_missed_or_not_measured() -> None:
    least, most, wanted = Aim("a", "b", "c", least=0.05), Aim("a", "b", "c", most=10), Aim("a", "b", "c")
    assert [least.verdict(x) for x in (0.05, 0.04, -1.0, None)] == ["reached", "missed", "missed", "not measured"]
    assert [most.verdict(x) for x in (9, 10.5)] == ["reached", "missed"]
    assert wanted.verdict(3.0) == "measured" and wanted.verdict("does not fit") == "not measured"
    assert {aim.block for aim in AIMS} <= first_light.SECONDS.keys()


def test_the_page_has_the_aims_and_the_blocks() -> None:
    page = (first_light.ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    for aim in AIMS:
        assert f"| {aim.what} | {aim.bound()} | `{aim.block}` | {aim.key} |" in page
    assert [name for name in first_light.SECONDS if f"`{name}`" not in page] == []


def test_the_parts_for_an_offline_machine_are_of_one_size_and_join_to_what_was_packed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    archive, wheels = rng.bytes(50_000), {"chz-0.4.0-py3-none-any.whl": 3000, "pycountry-26.2-py3-none-any.whl": 9000}
    for part in range(5):
        (folder := tmp_path / f"part{part}").mkdir()
        if part < 4:
            (folder / f"vllm.tar.xz.{part}").write_bytes(archive[part * 15_000 : (part + 1) * 15_000])
    for name, size in wheels.items():
        (tmp_path / "part4" / name).write_bytes(bytes(size))
    script = tmp_path / "project" / "benchmarks" / "gpu" / "offline.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(first_light.ROOT / "benchmarks" / "gpu" / "offline.sh", script)
    subprocess.run(["bash", script, "pack", tmp_path / "part"], check=True, capture_output=True)
    light = tmp_path / "project" / ".light"
    assert (light / "1" / "commit").read_text() == ""  # of a folder that is no repository
    assert b"".join((light / str(part) / f"vllm.tar.xz.{part}").read_bytes() for part in (1, 2, 3)) == archive
    assert [file.name for file in light.rglob("*.whl")] == ["chz-0.4.0-py3-none-any.whl"]
    sizes = [sum(file.stat().st_size for file in (light / str(part)).iterdir()) for part in (1, 2, 3)]
    assert max(sizes) - min(sizes) <= 2


def test_blocks_run_in_turn_or_together_and_what_failed_comes_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    together, began = Barrier(2, timeout=600), list[str]()

    def run(name: str, out: Path, limit: float) -> dict[str, Any]:
        began.append(name)
        if name in ("learning", "star_graph_run"):
            together.wait()
        assert limit == first_light.SECONDS[name]
        return {"passed": name != "head", "seconds": 1.0}

    monkeypatch.setattr(first_light, "run_block", run)
    for name, passed in (("facts", True), ("sampling", False)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"passed": passed}))
    blocks = "facts,sampling,learning+star_graph_run,head"
    monkeypatch.setattr("sys.argv", ["first_light.py", "--out", str(tmp_path), "--blocks", blocks])
    assert first_light.main() == 1
    assert set(began[:2]) == {"learning", "star_graph_run"} and began[2:] == ["head", "sampling"]


def test_blocks_that_hang_leave_time_to_the_next_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The third command of a machine that is lent: both blocks with vLLM first hang, and the rest is measured."""
    now, taken = 0.0, dict[str, float]()

    def run(name: str, out: Path, limit: float) -> dict[str, Any]:
        nonlocal now
        taken[name] = limit if name in ("half_b_engine", "sampling") else min(85, limit)
        now += taken[name]
        return {"passed": False, "seconds": taken[name]}

    monkeypatch.setattr(first_light, "run_block", run)
    monkeypatch.setattr(first_light, "time", SimpleNamespace(monotonic=lambda: now))
    blocks = "half_b_engine,sampling,large_models,star_graph_run"
    arguments = ["--out", str(tmp_path), "--seconds", "450", "--blocks", blocks]
    monkeypatch.setattr("sys.argv", ["first_light.py", *arguments])
    assert first_light.main() == 4
    assert taken == {"half_b_engine": 180, "sampling": 155, "large_models": 75, "star_graph_run": 40}


def test_an_engine_that_hangs_ends_its_round_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "ROUND_SECONDS", 0.01)
    killed = list[str]()
    process: Any = SimpleNamespace(stdin=io.StringIO(), kill=lambda: killed.append("ours"))
    engine = sampling.EngineProcess("ours", process)
    with pytest.raises(RuntimeError, match="no answer in time"):
        sampling.measure(FIRST["ours"], [engine], deadline=float("inf"))
    assert killed == ["ours"]


def test_figures_are_kept_while_a_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This one ends when it sees its figure in the summary, and then its number is forgotten."""
    figure = json.dumps({"passed": False, "device": "cpu", "failed": [], "tokens/s": 7, "error": "ended early"})
    block = f"""
import pathlib, time
summary = pathlib.Path({str(tmp_path / "first_light.json")!r})
print({figure!r}, flush=True)
while not (summary.exists() and '"tokens/s": 7' in summary.read_text()):
    time.sleep(0.01)
print('{{"passed": true, "device": "cpu", "tokens/s": 7}}')
"""
    started = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return started([command[0], "-c", block], **options)

    monkeypatch.setattr(first_light.subprocess, "Popen", start)
    monkeypatch.setattr(first_light, "SECONDS", {"shown": 0})
    monkeypatch.setattr(first_light, "SHOWN_EVERY", 0.05)
    assert first_light.run_block("shown", tmp_path, 120.0)["passed"] and not list(tmp_path.glob("*.pid"))


def test_what_a_killed_driver_left_is_ended(tmp_path: Path) -> None:
    """A block is in a session of its own, which a machine's time limit does not end."""
    (out := tmp_path / "out").mkdir()
    block = tmp_path / "benchmarks" / "gpu" / "shown.py"
    block.parent.mkdir(parents=True)
    for folder in (block.parent, block.parent.parent):
        (folder / "__init__.py").touch()  # else a package of that name in PYTHONPATH comes first
    block.write_text("import time\ntime.sleep(1000)\n")
    blocks = [
        subprocess.Popen([sys.executable, "-m", "benchmarks.gpu.shown"], cwd=tmp_path, start_new_session=True)
        for _ in range(2)
    ]
    try:
        (out / "shown.pid").write_text(str(blocks[0].pid))
        (out / "other.pid").write_text(str(blocks[1].pid))  # a number that is another process's by now
        for process in blocks:
            wait_until(lambda process=process: b"shown" in Path(f"/proc/{process.pid}/cmdline").read_bytes())
        first_light.end_left_behind(out)
        assert blocks[0].wait(60) == -signal.SIGKILL and blocks[1].poll() is None and not list(out.iterdir())
    finally:
        for process in blocks:
            process.kill()
            process.wait()


def test_an_error_ends_a_part_of_a_block(capsys: pytest.CaptureFixture[str]) -> None:
    record = Record()
    with record.going_on("first"):
        raise ValueError("no kernel\nfor this size")
    record.figure("second", 2.0)
    record.print()
    found = first_light.last_record(capsys.readouterr().out.splitlines())
    assert found["first"] == "error: ValueError: no kernel for this size" and found["second"] == 2.0
    assert not found["passed"] and found["failed"] == ["first"]


def test_what_is_sent_back_is_never_half_written(tmp_path: Path) -> None:
    """copy_results of offline.sh, beside a log that grows."""
    kept, sent = tmp_path / "kept" / "first_light", tmp_path / "sent"
    for folder in (kept, sent):
        folder.mkdir(parents=True)
    (kept / "first_light.json").write_text("{}")
    (kept / "facts.log").write_text("{}\n")
    script = (first_light.ROOT / "benchmarks" / "gpu" / "offline.sh").read_text()
    function = script[script.index("copy_results() {") : script.index("run_blocks() {")]
    command = f"set -euo pipefail; keep={kept.parent}; OUT={sent}\n{function}\ntar() {{ command tar $*; return 1; }}"
    subprocess.run(["bash", "-c", f"{command}\ncopy_results"], check=True)
    assert {file.name for file in sent.iterdir()} == {"first_light.json", "first_light.tgz"}
    assert b"facts.log" in subprocess.run(["tar", "-tzf", sent / "first_light.tgz"], capture_output=True).stdout


def test_a_run_left_behind_outlives_its_command_and_ends_with_the_next(tmp_path: Path) -> None:
    script = (first_light.ROOT / "benchmarks" / "gpu" / "offline.sh").read_text()
    functions = script[script.index("start_beside() {") : script.index("case $1 in")]
    driver = tmp_path / "sent" / "benchmarks" / "gpu" / "first_light.py"
    driver.parent.mkdir(parents=True)
    driver.write_text("import sys, time\nprint(*sys.argv[1:], flush=True)\ntime.sleep(1000)\n")
    keep = tmp_path / "kept"

    def command(line: str) -> None:
        setting = f"set -euo pipefail; keep={keep}; cd {tmp_path / 'sent'}\n{functions}\n"
        subprocess.run(["bash", "-c", setting + line], check=True)

    command("start_beside warm_start")
    shutil.rmtree(tmp_path / "sent" / "benchmarks")  # the next command brings it anew
    beside, log = int((keep / "beside.pid").read_text()), keep / "beside.log"
    process = Path(f"/proc/{beside}/cmdline")
    wait_until(lambda: log.exists() and "--blocks warm_start" in log.read_text())
    assert os.getsid(beside) == beside  # the machine ends what is of the command's session
    command("stop_beside; stop_beside")
    assert not process.exists() or not process.read_bytes()


def test_rl_goes_on_from_a_supervised_run_that_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    began = []

    def run(record: Record, name: str, command: str, folder: Path, show: Any) -> None:
        began.append(name)
        metric = learning.ALONE if name == "sft" else learning.AFTER_RL
        for step, accuracy in ((0, 0.25), (2, 0.5), (4, 0.375)):
            (folder / "checkpoints" / f"{step:06d}").mkdir(parents=True)
            RunFolder(folder).record_checkpoint(f"{step:06d}", step, folder / "checkpoints" / f"{step:06d}")
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, metric: accuracy + (name == "rl") * 0.25}) + "\n")
        (folder / "checkpoints" / "final").mkdir()
        assert name == "sft" or f"{tmp_path}/learning/sft/checkpoints/000002" in command  # the best
        show(folder)

    monkeypatch.setenv("BLOCK_RUNS", str(tmp_path))
    monkeypatch.setattr(learning, "run", run)
    warm_start.main()
    learning.main()
    assert began == ["sft", "rl"] and not list(tmp_path.iterdir())


def test_figures_of_a_cpu_are_not_judged() -> None:
    on = {name: {"sampling": {"device": name, "rollouts / raw": 0.5}} for name in ("cpu", "NVIDIA H200")}
    row = [aim.key for aim in AIMS].index("rollouts / raw")
    assert [table(records)[row][-1] for records in on.values()] == ["of a CPU", "missed"]


def test_one_file_has_all_blocks_and_the_aims(tmp_path: Path) -> None:
    machine = {"commit": "abc", "device_type": "cuda"}
    (tmp_path / "facts.json").write_text(json.dumps({"passed": True, "machine": machine}))
    (tmp_path / "half_b_engine.json").write_text(json.dumps({"device": "NVIDIA H200", "sync: in all, ms": 4.5}))
    first_light.write_summary(tmp_path)
    found = json.loads((tmp_path / "first_light.json").read_text())
    assert found["commit"] == "abc" and set(found["blocks"]) == {"facts", "half_b_engine"}
    sync = next(aim for aim in found["aims"] if aim["figure"] == "sync: in all, ms")
    assert sync["verdict"] == "reached" and sync["found"] == "4.5"


def test_the_pair_of_the_ratio_is_measured_in_turn() -> None:
    assert in_order(["ours", "rollouts", "raw"]) == ["rollouts", "raw", "rollouts", "raw", "ours"]
    assert in_order(["ours", "raw"]) == ["raw", "ours"]
    found = summary({"raw": [30.0, 40.0], "rollouts": [28.0, 35.0], "ours": [38.0], "processes-4": [70.0]})
    assert found == {
        "tokens/s, one engine": 40.0,
        "tokens/s, several engines": 70.0,
        "rollouts / raw": pytest.approx(0.875),
    }
    assert summary({"ours-profile": [1.0]}) == {} and set(in_order([*FIRST, *MORE])) == {*FIRST, *MORE}


def test_a_load_is_timed_by_copies_and_by_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_weights, "_is_on_cpu", lambda model: False)
    model = Loaded()
    _, copies = record(model, lambda: random(0))
    worker: Any = SimpleNamespace(get_model=lambda: model, recorded_copies=copies)
    found = loads(worker, cast(Any, lambda weights: weights), lambda: random(1))
    assert worker.recorded_copies is copies and found.keys() == {"ms", "GB", "by vLLM's loaders, ms"}
    # fp32 is read and written, once; "norm" is kept in bf16, and the tied head is not loaded
    loaded = sum(tensor.numel() for name, tensor in random(1) if name != "lm_head")
    assert found["GB"] == pytest.approx((8 * loaded - 2 * 4) / 1e9)
    assert torch.equal(model.up, dict(random(1))["up"].T)


def test_a_model_of_more_rows_than_tokens_has_a_text_to_stop_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Trap: it samples ids without a text, before it is trained and after steps on one random text after the other."""
    config = copy.deepcopy(PRESETS["micro"])
    config.vocab_size = 5000
    monkeypatch.setitem(PRESETS, "micro", config)
    record = Record()
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        client = service.create_training_client("micro")
        sampled = client.save_weights_and_get_sampling_client().sample(
            repeated(TRAINED_ON, 3), 1, SamplingParams(max_tokens=5, temperature=0.0, stop=[])
        )
        assert max(sampled.result().sequences[0].tokens) >= VOCABULARY
        check_stop_string_of_trained(record, client)
    assert record.passed


def test_training_is_measured_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Those settings of `train_step` that are profiled, and `large_models`, on a stand-in."""
    on_gpu: dict[str, Any] = {"use_device": "cuda", "device_type": DeviceType.CUDA}
    ranges = {train_step.HEAD: (0, 30), "## Call CompiledFxGraph x ##": (0, 90)}
    events = [FunctionEvent(1, "nvjet", 7, 10, 20, **on_gpu), FunctionEvent(2, "elementwise", 7, 40, 60, **on_gpu)]
    events += [FunctionEvent(3, name, 7, *ab, is_user_annotation=True, **on_gpu) for name, ab in ranges.items()]
    data = train_step.random_data
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: nullcontext(SimpleNamespace(events=lambda: events)))
    monkeypatch.setattr(train_step, "random_data", lambda rows, length, vocabulary: data(2, 40, vocabulary))
    monkeypatch.setitem(PRESETS, "qwen2.5-0.5b-shape", PRESETS["micro"])
    profiled = {title: train_step.VARIANTS[title] for title in train_step.PROFILED}
    monkeypatch.setattr(train_step, "VARIANTS", profiled)
    with pretend_gpu():
        for block in (train_step, large_models):
            block.main()
            found = first_light.last_record(capsys.readouterr().out.splitlines())
            assert found["passed"] and found["device"] == "NVIDIA H200", found
            for title in profiled if block is train_step else large_models.EIGHT_B:
                assert found[title]["tokens/s"] > 0
            for title in profiled if block is train_step else ():
                kernels = {"head GEMM": 0.01, "body element-wise": 0.02, "launches": 2.0, "head's ranges found": 1}
                assert kernels.items() <= found[f"{title}: profile"].items()
