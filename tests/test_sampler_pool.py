"""The pool of sampler replicas, with fakes instead of processes: routing, weights, deaths."""

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from posttrain.backend.cluster import ProcessLost
from posttrain.backend.engine import SequenceRequest
from posttrain.backend.errors import EngineError, StaleSamplerError
from posttrain.backend.futures import APIFuture
from posttrain.backend.routing import Router, SamplingGroup, sampling_group
from posttrain.backend.sampler_pool import SamplerPool
from posttrain.backend.spans import Spans
from posttrain.backend.types import SampledSequence, SampleResponse, SamplingParams
from posttrain.backend.weight_files import FileWeights
from posttrain.backend.weight_versions import Policy, SnapshotMemory, WeightVersion
from tests.processes import PATIENCE, wait_until

# --- routing ------------------------------------------------------------------------------------


def test_new_groups_go_to_the_lightest_replica_and_ties_take_turns() -> None:
    router = Router(3, deterministic=False)
    groups = [SamplingGroup(number) for number in range(6)]
    places = [router.open(group, 8, range(3)) for group in groups]
    assert sorted(places[:3]) == sorted(places[3:]) == [0, 1, 2]
    router.close(groups[1], 8, places[1])
    assert router.open(SamplingGroup(9), 1, range(3)) == places[1]


@pytest.mark.parametrize(
    ("others", "lightest", "stays"),
    [(0, 0, True), (1, 0, False), (6, 4, True), (7, 4, False), (3, 2, True)],  # SLACK is 1.5
)
def test_a_group_leaves_a_replica_that_others_crowd(others: int, lightest: int, stays: bool) -> None:
    router, group = Router(2, deterministic=False), SamplingGroup(0)
    place = router.open(group, 8, range(2))
    router.open_S[place] += others
    router.open_S[1 - place] = lightest
    assert (router.open(group, 1, range(2)) == place) == stays


def test_members_of_a_group_share_a_replica_and_so_do_equal_prompts() -> None:
    router = Router(4, deterministic=False)

    def place(prompt: list[int]) -> tuple[int, SamplingGroup]:
        group = router.group_of(prompt)
        return router.open(group, 1, range(4)), group

    with sampling_group((0, 5)):
        members = [place([1, number]) for number in range(8)]
    assert len({replica for replica, _ in members}) == 1
    equal = [place([7, 7]) for _ in range(8)]
    assert len({replica for replica, _ in equal}) == 1 and equal[0][0] != members[0][0]
    del members, equal
    assert not router._prompts  # forgotten with the last request


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_request_for_one_replica_goes_there_while_it_serves(deterministic: bool) -> None:
    router = Router(3, deterministic)
    router.open_S[2] = 100
    with sampling_group((0,), only=2):
        group = router.group_of([1])
    assert router.open(group, 1, [0, 1, 2]) == 2
    assert router.open(group, 1, [0, 1]) in (0, 1)


def test_deterministic_places_depend_on_the_group_alone() -> None:
    router = Router(2, deterministic=True)
    router.open_S[1] = 100
    assert [router.open(SamplingGroup(number), 1, [0, 1]) for number in range(4)] == [0, 1, 0, 1]
    assert [router.open(SamplingGroup(number), 1, [0]) for number in range(2)] == [0, 0]


# --- the pool -----------------------------------------------------------------------------------


class FakeReplica:
    """Answers at once, or when told; its tokens are those of the seed."""

    def __init__(self, index: int, answers: bool = True):
        self.index, self.answers, self.dead, self.number = index, answers, False, -1
        self.steps = 0
        self.asked: list[tuple[list[SequenceRequest], Future]] = []
        self.loaded: dict[str, torch.Tensor] = {}
        self.older: list[FileWeights | None] = []
        self.dies_in_sync = False

    def opened(self) -> Future:
        return done(None)

    def sample(self, requests, number, weights, keep) -> Future:  # noqa: ANN001
        future: Future = Future()
        self.asked.append((requests, future))
        self.older.append(weights)
        assert self.number >= 0
        if self.dead:
            future.set_exception(ProcessLost("dead"))
        elif self.answers:
            self.answer()
        return future

    def answer(self) -> None:
        for requests, future in self.asked:
            if not future.done():
                self.steps += 1
                sequences = [SampledSequence([request.seed], [-1.0], "stop") for request in requests]
                future.set_result(SampleResponse(sequences, None, None))

    def withdraw(self, answer: Future) -> None:
        answer.cancel()

    def sync(self, number: int, weights: FileWeights) -> Future:
        if self.dies_in_sync:
            self.kill()
            return failed(ProcessLost("in sync"))
        self.number, self.loaded = number, dict(weights)
        return done(0.0)

    def progress(self) -> Future:
        return failed(ProcessLost("dead")) if self.dead else done(self.steps)

    def kill(self) -> None:
        self.dead = True
        for _, future in self.asked:
            if not future.done():
                future.set_exception(ProcessLost("killed"))


def done(result: object) -> Future:
    future: Future = Future()
    future.set_result(result)
    return future


def failed(error: Exception) -> Future:
    future: Future = Future()
    future.set_exception(error)
    return future


class Pool:
    def __init__(self, folder: Path, size: int = 2, restarts: int = 0, answers: bool = True):
        self.replicas: list[FakeReplica] = []

        def start(index: int) -> FakeReplica:
            self.replicas.append(FakeReplica(index, answers or len(self.replicas) >= size))
            return self.replicas[-1]

        self.pool = SamplerPool(start, size, folder, restarts, 60.0, deterministic=False)
        self.policy, self.folder, self.memory = Policy(SnapshotMemory(1.0), False), folder, SnapshotMemory(1.0)
        self.tensor = torch.zeros(3, 2)

    def sync(self) -> WeightVersion:
        number = self.policy.newest.number + 1 if self.policy.newest else 0
        self.tensor = torch.full((3, 2), float(number))
        version = WeightVersion(number, lambda: [("w", self.tensor)])
        self.pool.sync(self.policy, version)
        return version

    def sample(
        self, seed: int, version: WeightVersion | None = None, keep: bool = False, on_tokens: Callable | None = None
    ) -> APIFuture[list[int]]:
        request = SequenceRequest([1, seed], SamplingParams(), 4, seed, on_tokens=on_tokens)
        return self.pool.submit(
            self, [request], self.policy, version, keep, lambda response: response.sequences[0].tokens
        )


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Pool]]:
    monkeypatch.setattr("posttrain.backend.sampler_pool.WATCH_SECONDS", 0.02)
    pools: list[Pool] = []

    def new(**options) -> Pool:  # noqa: ANN003
        pools.append(Pool(tmp_path, **options))
        return pools[-1]

    yield new
    for pool in pools:
        pool.pool.close()
        if pool.policy.newest:
            pool.policy.newest.drop()
    gc.collect()  # a failed sync keeps its frame
    wait_until(lambda: not list(tmp_path.iterdir()))  # published weights are gone


def test_nothing_is_sampled_without_weights_and_the_version_moves_after_all_replicas(
    make: Callable[..., Pool],
) -> None:
    pool = make()
    with pytest.raises(EngineError, match="no weights yet"):
        pool.sample(1).result(PATIENCE)
    version = pool.sync()
    assert pool.policy.newest is version and [replica.number for replica in pool.replicas] == [0, 0]
    assert pool.sample(5).result(PATIENCE) == [5]
    pool.sync()
    assert torch.equal(pool.replicas[1].loaded["w"], torch.ones(3, 2))
    assert len(list(pool.folder.iterdir())) == 1  # the older version's files are gone


def test_older_versions_are_stale_or_kept_as_files(make: Callable[..., Pool]) -> None:
    pool = make()
    first = pool.sync()
    release = first.hold(pool)
    assert pool.sample(1, first).result(PATIENCE) == pool.sample(1, first, keep=True).result(PATIENCE) == [1]
    (replaced,) = [weights for replica in pool.replicas for weights in replica.older if weights is not None]
    assert torch.equal(dict(replaced)["w"], torch.zeros(3, 2))  # a sync that is under way may have replaced them
    del replaced
    for replica in pool.replicas:
        replica.older.clear()
    pool.policy.before_change(None)  # type: ignore[arg-type]  # the files are the copy
    pool.sync()
    with pytest.raises(StaleSamplerError, match="version 0 only"):
        pool.sample(1, first).result(PATIENCE)
    assert pool.sample(1, first, keep=True).result(PATIENCE) == [1]
    (weights,) = [older for replica in pool.replicas for older in replica.older if older is not None]
    assert torch.equal(dict(weights)["w"], torch.zeros(3, 2))
    del weights
    for replica in pool.replicas:
        replica.older.clear()
    release()
    assert len(list(pool.folder.iterdir())) == 1


def test_requests_of_a_dead_replica_go_to_the_others_unchanged(make: Callable[..., Pool]) -> None:
    pool = make(answers=False)
    pool.sync()
    futures = [pool.sample(seed) for seed in range(8)]
    first, second = pool.replicas
    assert len(first.asked) == len(second.asked) == 4
    before = [(request.seed, request.prompt) for requests, _ in first.asked for request in requests]
    first.kill()
    wait_until(lambda: len(second.asked) == 8)
    again = [(request.seed, request.prompt) for requests, _ in second.asked[4:] for request in requests]
    assert again == before
    second.answer()
    assert [future.result(PATIENCE) for future in futures] == [[seed] for seed in range(8)]
    assert pool.pool.deaths == 1 and pool.pool.num_in_flight == 0


def test_a_replacement_serves_only_once_it_has_weights(make: Callable[..., Pool]) -> None:
    pool = make(size=1, restarts=1, answers=False)
    pool.sync()
    future = pool.sample(3)
    pool.replicas[0].kill()
    assert future.result(PATIENCE) == [3]  # FakeReplica.sample refuses before its first sync
    assert len(pool.replicas) == 2 and pool.replicas[1].number == 0


@pytest.mark.parametrize("restarts", [1, 2])
def test_a_replacement_that_fails_is_replaced(restarts: int, make: Callable[..., Pool]) -> None:
    """As where the dead one's memory is not free yet."""
    pool = make(restarts=restarts)
    pool.sync()
    start = pool.pool._start

    def fails_once(index: int) -> FakeReplica:
        pool.pool._start = start
        raise EngineError("out of memory")

    pool.pool._start = fails_once
    pool.replicas[0].kill()
    wait_until(lambda: pool.pool.deaths == 1 and not pool.pool._starting)
    assert len(pool.replicas) == restarts + 1 and pool.pool._restarts == 0
    assert [place.serving for place in pool.pool._places] == [restarts == 2, True]


def test_a_replacement_that_starts_as_the_pool_ends_is_ended_without_a_word(
    make: Callable[..., Pool], capsys: pytest.CaptureFixture
) -> None:
    pool = make(restarts=3)
    pool.sync()
    starting: list[FakeReplica] = []
    opened = Future[None]()

    class Starting(FakeReplica):
        def opened(self) -> Future:
            starting.append(self)
            return opened

    pool.pool._start = Starting
    pool.replicas[0].kill()
    wait_until(lambda: starting)
    pool.pool.close()
    opened.set_exception(ProcessLost("Ray was stopped"))
    wait_until(lambda: not pool.pool._starting)
    assert len(starting) == 1 and starting[0].dead and "the replacement" not in capsys.readouterr().out


def test_without_a_replica_everybody_is_told(make: Callable[..., Pool]) -> None:
    pool = make(answers=False)
    pool.sync()
    futures = [pool.sample(seed) for seed in range(4)]
    for replica in pool.replicas:
        replica.kill()
    for future in futures:
        with pytest.raises(EngineError, match="the sampler replicas have stopped"):
            future.result(PATIENCE)
    with pytest.raises(EngineError):
        pool.sample(9)
    with pytest.raises(EngineError):
        pool.sync()


def test_a_request_that_kills_replicas_is_given_up(make: Callable[..., Pool]) -> None:
    pool = make(size=4, answers=False)
    pool.sync()
    future = pool.sample(1)

    def kill_who_has_it() -> bool:
        for replica in pool.replicas:
            if any(not asked.done() for _, asked in replica.asked):
                replica.kill()
        return future.done()

    wait_until(kill_who_has_it)
    with pytest.raises(EngineError, match="3 sampler replicas died with this request"):
        future.result(PATIENCE)
    assert sum(not replica.dead for replica in pool.replicas) == 1


def test_a_replica_that_dies_in_a_sync_leaves_the_others(make: Callable[..., Pool]) -> None:
    pool = make(restarts=1)
    pool.sync()
    pool.replicas[0].dies_in_sync = True
    version = pool.sync()
    assert pool.policy.newest is version and pool.replicas[1].number == 1
    wait_until(lambda: len(pool.replicas) == 3 and pool.replicas[2].number == 1)
    assert pool.sample(1).result(PATIENCE) == [1]


def test_a_replica_that_decodes_nothing_is_killed(make: Callable[..., Pool]) -> None:
    pool = make(answers=False)
    pool.sync()
    future = pool.sample(1)
    (hanging,) = [replica for replica in pool.replicas if replica.asked]
    (other,) = [replica for replica in pool.replicas if not replica.asked]
    other.answers = True
    pool.pool._call_seconds = 0.2
    assert future.result(PATIENCE) == [1] and hanging.dead and not other.dead


def test_the_pool_records_what_its_replicas_are_at(make: Callable[..., Pool]) -> None:
    pool, spans = make(size=1, answers=False), Spans()
    pool.pool._spans, pool.pool._first = spans, 3
    pool.sync()
    futures = [pool.sample(seed) for seed in range(2)]
    pool.replicas[0].answer()
    assert [future.result(PATIENCE) for future in futures] == [[0], [1]]
    recorded = [(span.kind, span.process, span.tokens) for span in reversed(spans.between(0, time.perf_counter()))]
    # a span up to each answer
    assert recorded == [
        ("publish", "sync", 0),
        ("load", "replica 3", 0),
        ("load", "sync", 0),
        ("sampling", "replica 3", 1),
        ("sampling", "replica 3", 1),
    ]
    assert not spans._open


def test_a_death_without_requests_is_noticed(make: Callable[..., Pool]) -> None:
    pool = make(restarts=1)
    pool.sync()
    pool.replicas[0].kill()
    wait_until(lambda: len(pool.replicas) == 3 and pool.replicas[2].number == 0)
    assert pool.pool.deaths == 1


def test_a_start_that_fails_is_its_error_and_leaves_nothing(tmp_path: Path) -> None:
    replicas: list[FakeReplica] = []

    class Broken(FakeReplica):
        def opened(self) -> Future:
            return failed(ValueError("no such kernel")) if self.index else done(None)

    def start(index: int) -> FakeReplica:
        replicas.append(Broken(index))
        return replicas[-1]

    with pytest.raises(ValueError, match="no such kernel"):
        SamplerPool(start, 2, tmp_path, 0, 60.0, deterministic=False)
    assert all(replica.dead for replica in replicas)


def test_a_replica_that_never_starts_is_an_error_within_the_limit(tmp_path: Path) -> None:
    replicas: list[FakeReplica] = []

    class Silent(FakeReplica):
        def opened(self) -> Future:
            return Future() if self.index else done(None)

    def start(index: int) -> FakeReplica:
        replicas.append(Silent(index))
        return replicas[-1]

    text = r"sampler replica 1: no answer in 0.1 seconds \(backend.call_seconds\): it has not started"
    with pytest.raises(EngineError, match=text):
        SamplerPool(start, 2, tmp_path, 0, 0.1, deterministic=False)
    assert all(replica.dead for replica in replicas)


def test_cancelled_calls_are_withdrawn_and_streams_get_all_tokens_at_once(make: Callable[..., Pool]) -> None:
    pool = make(answers=False)
    pool.sync()

    async def wait() -> None:
        task = asyncio.create_task(pool.sample(1).coroutine())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(wait())
    assert pool.pool.num_in_flight == 0
    seen: list[list[int]] = []
    future = pool.sample(7, on_tokens=seen.append)
    for replica in pool.replicas:
        replica.answers = True
        for requests, asked in replica.asked:
            assert all(request.on_tokens is None for request in requests)
            if asked.done():
                continue
            replica.answer()
    assert future.result(PATIENCE) == [7] and seen == [[7]]
