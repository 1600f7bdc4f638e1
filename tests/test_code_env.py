"""Programs in the sandbox: what they are judged to be, and that none of them reaches the
trainer.
"""

import asyncio
import errno
import json
import os
import platform
import re
import secrets
import subprocess
import sys
from pathlib import Path

import chz
import pytest

import envs.sandbox
from envs import sandbox_filter
from envs.code import AssertTest, CodeBuilder, CodeGrader, OutputTest, extract_program, generated_problems, run_test
from envs.problem import Problem
from envs.problem_env import ProblemEnv
from envs.sandbox import SandboxError, SandboxLimits, run_program
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.renderers import get_renderer
from posttrain.renderers.turns import encode, eos
from rl.types import RolloutError
from tests.processes import wait_until

QUICK = SandboxLimits(cpu_seconds=2, wall_seconds=120.0, memory_mb=256, file_mb=4)
IMPATIENT = chz.replace(QUICK, wall_seconds=1.0)  # where a time-out is what is wanted
RENDERER = get_renderer("plain", character_tokenizer(512))


def outcome(program: str, test: OutputTest | AssertTest | None = None, limits: SandboxLimits = QUICK) -> str:
    return asyncio.run(run_test(program, test or OutputTest("", "the right answer"), limits)).outcome


HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "endless loop": "while True: pass",
    "10 GB of output": "import sys\nfor _ in range(10_000): sys.stdout.write('x' * 2**20)",
    "one large file": "f = open('f', 'w')\nfor _ in range(10_000): f.write('x' * 2**20)",
    "many small files": "import os\nfor i in range(10**7):\n    open(f'/tmp/f{i}' if i == 0 else f'f{i}', "
    "'w').write('x' * 4096)",
    "the parent's environment": "import os\nprint(open(f'/proc/{os.getppid()}/environ').read())",
    "the trainer's environment": "print(open('/proc/TRAINER/environ').read())",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill the trainer": "import os\nos.kill(TRAINER, 9)",
    "kill everyone": "import os\nos.kill(-1, 9)\nos.kill(os.getpid(), 9)",
    "all memory": "x = []\nwhile True: x.append(bytearray(2**24))",
}


# Trap: a program that harms the trainer, or outlives its run.
@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_hostile_programs_are_failed_tests_and_the_trainer_is_unharmed(program, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_TRAINER", "42")
    program = program.replace("TRAINER", str(os.getpid()))
    verdict = asyncio.run(run_test(program, OutputTest("", "the right answer"), IMPATIENT))
    assert verdict.outcome != "passed" and "SECRET_OF_THE_TRAINER" not in verdict.detail


TRY = """
import ctypes, os, socket, threading
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = libc.mmap.restype = ctypes.c_void_p
def call(name, *arguments):
    ctypes.set_errno(0)
    return getattr(libc, name)(*arguments), ctypes.get_errno()
"""
HOLES = {
    "System V shared memory": "print(call('shmget', 0, 100 << 20, 0o1600))",
    "System V messages": "print(call('msgget', 0, 0o1600))",
    "System V semaphores": "print(call('semget', 0, 1000, 0o1600))",
    "memfd": "print(call('memfd_create', b'x', 0))",
    "user namespace": "print(call('unshare', 0x10000000))",
    "user namespace of a child": "print(call('syscall', CLONE, 0x10000000 | 17, 0, 0, 0, 0))",
    "user namespace by clone3": "print(call('syscall', 435, (ctypes.c_uint64 * 8)(0x10000000, 0, 0, 0, 17), 64))",
    "tmpfs": "print(call('mount', b'x', b'.', b'tmpfs', 0, b''))",
    "io_uring": "print(call('syscall', 425, 8, ctypes.create_string_buffer(120)))",
    "AF_VSOCK": "print(call('socket', 40, 1, 0))",
    "AF_NETLINK": "print(call('socket', 16, 3, 0))",
}
REFUSED = {f"(-1, {error})" for error in (errno.EPERM, errno.ENOSYS, errno.EAFNOSUPPORT)}


@pytest.fixture(params=["as it comes", "without namespaces"])
def supervisor(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor, and one that root's container forbids to make namespaces. Who is not root is
    refused without.
    """
    # without namespaces a program cannot reach an interpreter in a folder of root's
    everyones_python = "/usr/bin/python3"
    if request.param == "without namespaces" and os.getuid() == 0 and os.path.exists(everyones_python):
        monkeypatch.setattr(sys, "executable", everyones_python)
        source = envs.sandbox.SUPERVISOR.read_text()
        changed = source.replace(
            "check(libc.unshare(NEWPID", 'raise OSError(1, "not allowed") if is_root else check((libc.unshare(NEWPID'
        )
        changed = changed.replace('NEWPID | NEWUSER), "unshare")', 'NEWPID | NEWUSER)), "unshare")')
        (tmp_path / "supervisor.py").write_text(changed)
        monkeypatch.setattr(envs.sandbox, "SUPERVISOR", tmp_path / "supervisor.py")


# Trap: memory, namespaces and sockets beyond the sandbox's limits.
@pytest.mark.usefixtures("supervisor")
def test_calls_that_leave_the_limits_or_the_namespaces_are_refused():
    clone = {"x86_64": "56", "aarch64": "220"}[platform.machine()]
    lines = [program.replace("CLONE", clone) for program in HOLES.values()]
    run = asyncio.run(run_program(TRY + "\n".join(lines), limits=QUICK))
    answers = dict(zip(HOLES, run.stdout.splitlines(), strict=True))
    assert run.isolation.filtered and {hole: answer for hole, answer in answers.items() if answer not in REFUSED} == {}


@pytest.mark.usefixtures("supervisor")
def test_what_programs_need_is_not_refused():
    program = """
import asyncio, os, socket, subprocess, sys, threading
threading.Thread(target=print, args=(1,)).start()
a, b = socket.socketpair()
a.send(b"2"); print(b.recv(1).decode())
child = os.fork()
if child == 0: os._exit(0)
print(3 + os.waitpid(child, 0)[1])
print(subprocess.run([sys.executable, "-S", "-c", "print(4)"], capture_output=True, text=True).stdout, end="")
asyncio.run(asyncio.sleep(0.01)); print(5)
"""
    run = asyncio.run(run_program(program, limits=QUICK))
    assert (run.outcome, sorted(run.stdout.split())) == ("passed", list("12345")), run.stderr


def test_the_filters_numbers_are_those_of_this_machine():
    """x86_64's are compared with the C library's header where there is one; both tables have one
    number for each call.
    """
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    defined = dict(re.findall(r"__NR_(\w+) (\d+)", header.read_text())) if header.exists() else {}
    assert {
        name: numbers[0]
        for name, numbers in sandbox_filter.REFUSED.items()
        if defined.get(name, str(numbers[0])) != str(numbers[0])
    } == {}
    for column in (0, 1):
        assert len({numbers[column] for numbers in sandbox_filter.REFUSED.values()}) == len(sandbox_filter.REFUSED)
    filters = [sandbox_filter.seccomp_filter(machine) for machine in ("x86_64", "aarch64")]
    assert all(filters) and filters[0] != filters[1] and sandbox_filter.seccomp_filter("riscv64") is None


# Trap: limits under which every program fails.
@pytest.mark.parametrize(
    ("limits", "what"),
    [
        ({"cpu_seconds": 0}, "at least 1"),
        ({"memory_mb": -1}, "at least 1"),
        ({"wall_seconds": float("nan")}, "finite"),
        ({"file_mb": 0}, "at least 1"),
        ({"memory_mb": 2}, "error while loading"),
        ({"wall_seconds": 1e-3}, "timeout"),
        ({"open_files": 2}, "error"),
    ],
)
def test_limits_under_which_no_program_runs_are_an_error_when_the_environment_is_built(
    limits: dict[str, float], what: str
):
    with pytest.raises(ConfigError, match=what):
        asyncio.run(CodeBuilder(limits=chz.replace(QUICK, **limits))(RENDERER))


def test_processes_that_leave_their_session_die_with_the_program():
    mark = secrets.token_hex(8)
    program = f"""
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        os.closerange(0, 3)
        os.execv(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(1000)", "{mark}"])
    os._exit(0)
time.sleep(0.2)
print("the right answer")
"""
    assert outcome(program) == "passed"
    ps = ["ps", "-eo", "args"]  # one that was killed is listed until it has had a core
    wait_until(lambda: mark not in subprocess.run(ps, capture_output=True, text=True, check=True).stdout)


def test_every_outcome():
    right = OutputTest("2\n3\n", "5\n\n")
    assert outcome("print(int(input()) + int(input()), ' ')", right) == "passed"
    assert outcome("print(int(input()) - int(input()))", right) == "wrong"
    assert outcome("print(1 / 0)") == "error"
    assert outcome("x = 'a' * 2**33") == "memory"
    assert outcome("print('x' * 100_000)") == "output_limit"
    assert outcome("import os; os.abort()") == "killed"
    assert outcome("import time; time.sleep(100)", limits=IMPATIENT) == "timeout"


def test_assert_tests_need_to_be_reached():
    test = AssertTest("assert double(2) == 4")
    assert outcome("def double(x): return 2 * x", test) == "passed"
    assert outcome("def double(x): return x ** x + 1", test) == "wrong"
    assert outcome("def double(x): return x.y", test) == "error"
    assert outcome("import sys; sys.exit(0)", test) == "wrong"
    assert outcome("import os; os._exit(0)", test) == "wrong"


def test_programs_see_no_network_no_packages_and_the_same_hashes():
    run = asyncio.run(run_program("import socket\nsocket.create_connection(('127.0.0.1', 1), 1)", limits=QUICK))
    # bubblewrap's has a loopback device of its own
    if run.isolation.namespaces and not run.isolation.why_not:
        assert "unreachable" in run.stderr  # not: refused
    assert "No module named 'torch'" in asyncio.run(run_program("import torch", limits=QUICK)).stderr
    hashes = [asyncio.run(run_program("print(hash('a'))", limits=QUICK)).stdout for _ in range(2)]
    assert hashes[0] == hashes[1] != ""


def test_a_cancelled_run_is_ended_before_its_limit():
    async def cancelled() -> None:
        endless = SandboxLimits(wall_seconds=3600, cpu_seconds=3600)
        task = asyncio.create_task(run_program("while True: pass", limits=endless))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())


# Trap: a sandbox that fails, scored as a wrong program.
def test_a_broken_sandbox_is_no_failed_test(tmp_path, monkeypatch):
    broken = tmp_path / "supervisor.py"
    broken.write_text("raise RuntimeError('out of order')")
    monkeypatch.setattr(envs.sandbox, "SUPERVISOR", broken)
    with pytest.raises(SandboxError, match="out of order"):
        asyncio.run(run_program("print(1)"))
    assert issubclass(SandboxError, RolloutError)


def test_no_more_programs_at_once_than_there_are_places(monkeypatch):
    running = most = 0

    async def pretend(request, seconds):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return {"outcome": "passed", "stdout": "", "stderr": "", "isolation": {"namespaces": True, "root": True}}

    async def many() -> None:
        await asyncio.gather(*(run_program("") for _ in range(4 * envs.sandbox.MAX_CONCURRENT)))

    monkeypatch.setattr(envs.sandbox, "_supervised", pretend)
    asyncio.run(many())
    asyncio.run(many())  # the places of one event loop are of no use to the next
    assert most == envs.sandbox.MAX_CONCURRENT


def step(env: ProblemEnv, text: str):
    return asyncio.run(env.step(encode(RENDERER.tokenizer, text) + eos(RENDERER.tokenizer)))


def test_rewards_and_metrics():
    tests = (OutputTest("1\n2\n", "3"), OutputTest("2\n2\n", "4"), OutputTest("0\n0\n", "0"))

    def env(limits: SandboxLimits = QUICK, partial_credit: bool = False) -> ProblemEnv:
        return ProblemEnv(Problem("Add.", "", CodeGrader(tests, limits, partial_credit)), RENDERER)

    right = step(env(), "So:\n```python\nprint(1)\n```\nNo:\n```\nprint(int(input()) + int(input()))\n```")
    assert (right.reward, right.metrics) == (1.0, {"format": 1, "correct": 1, "truncated": 0, "timeouts": 0})
    times = "```python\nprint(int(input()) * int(input()))\n```"  # 2, 4, 0: two of three
    assert step(env(), times).reward == 0 and step(env(), times).logs["tests"] == "1 wrong"
    partly = step(env(partial_credit=True), times)
    assert (
        partly.reward == pytest.approx(2 / 3)
        and partly.metrics["correct"] == 0
        and partly.logs["tests"] == "1 wrong, 2 passed"
    )
    assert step(env(), "print(3)").reward == pytest.approx(-0.1)
    assert step(env(limits=IMPATIENT), "```\nimport time; time.sleep(9)\n```").metrics["timeouts"] == 1


def test_the_last_closed_block_is_the_program():
    assert extract_program("```py\na\n```\n```\nb\nc\n```\n") == "b\nc\n"
    assert extract_program("```py\na\n```\n```\nb") == "a\n"
    assert extract_program("inline ```a``` only") is None


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("  ```python\n  if a:\n      b\n  ```", "if a:\n    b\n"),
        ("1. Like this:\n   ```python\n   a\n\n   b\n   ```\n2. Done", "a\n\nb\n"),
        ("- ```python\n  a\n  ```", "a\n"),
        ("* ```\na\n  b\n```", "a\n  b\n"),  # the block is not indented as its fence is
        ("\t```\n\tif a:\n\t\tb\n\t```", "if a:\n\tb\n"),
        ("````md\n```\na\n```\n````", "```\na\n```\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("```python\r\na\r\n```", "a\r\n"),
    ],
)
def test_fences_that_are_indented_or_in_list_items(text: str, program: str):
    assert extract_program(text) == program


def test_generated_problems_are_solved_by_their_solutions():
    problems = generated_problems()
    assert len({problem.question for problem in problems}) == len(problems) == 162
    program, test = problems[37].gold, problems[37].grader.tests[0]  # type: ignore[attr-defined]
    assert outcome(program, test) == "passed" and outcome(problems[38].gold, test) == "wrong"
    with pytest.raises(ConfigError, match="num_test=None of 162 generated problems"):
        CodeBuilder(num_test=None).splits()
    train, held_out = CodeBuilder(num_test=12).splits()
    assert len(train) == 150 and len(held_out) == 12 and not set(train) & set(held_out)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ({"question": "?", "tests": []}, "at least one test"),
        ({"question": "?", "tests": [{"stdin": "1"}]}, "must have 'stdin' and 'stdout', or 'assert'"),
        ({"question": "?", "tests": [{"assert": "assert ("}]}, "not Python"),
        ({"tests": [{"assert": "pass"}]}, "'question'"),
        ({"text": "Write f.", "test_list": ["assert f()"]}, "the fields are text, test_list"),
    ],
)
def test_bad_problems_are_named_by_file_and_line(tmp_path, line, what):
    good = {"question": "Double.", "tests": ["assert double(1) == 2", {"stdin": "1", "stdout": "2"}]}
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"problems\.jsonl:2") as error:
        asyncio.run(CodeBuilder(train_path=str(path))(RENDERER))
    assert what in str(error.value)
