"""One method of methods.py: rounds of sweep, choose, sample, score, select, train and evaluate.

Each stage writes a file (records.py) and is skipped if that exists, so a resumed command ends in
the same state. Round t samples from the weights of round t - 1 (round 0: the warm start) and trains
only on its own selection. With `keep_optimizer` all rounds are one training run in METHOD/train;
without it each round is a run in its own folder.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from posttrain.backend.errors import DataError
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum
from posttrain.renderers.types import Renderer
from posttrain.tracking.datasets import DrawnDataset
from posttrain.tracking.jsonl import append_jsonl, drop_torn_line, read_jsonl, write_atomically
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run_folder import open_run_folder
from posttrain.tracking.seeds import GREEDY, SAMPLE, SWEEP, TEST
from recipes.bstar.balance import Counts, choose, surface
from recipes.bstar.budget import Plan
from recipes.bstar.config import Config
from recipes.bstar.methods import METHODS, Method, RewardName
from recipes.bstar.metrics import Metrics, sample_metrics, selection_metrics
from recipes.bstar.records import (
    Candidate,
    Choice,
    Selected,
    Summary,
    read_candidates,
    read_choice,
    read_selection,
    scores_path,
    write_choice,
    write_scores,
    write_selection,
    write_summary,
)
from recipes.bstar.rewards import Reward
from recipes.bstar.sampling import Pool, sample_pool
from recipes.bstar.selection import counts, select, shortfall
from recipes.bstar.stages import policy_path
from recipes.bstar.tasks import Query, Task
from supervised import train as supervised_train
from supervised.data import conversation_to_datum, datum_from_tokens_weights
from supervised.types import SupervisedDatasetBuilder


@dataclass
class Lab:
    """Shared by all rounds: one training client, with the only engine, and the rewards."""

    config: Config
    task: Task
    renderer: Renderer
    client: TrainingClient
    rewards: Mapping[RewardName, Reward]
    loaded: Path | None = None  # the checkpoint in the client; None after training

    def sampler(self, policy: Path) -> SamplingClient:
        if self.loaded != policy:
            self.client.load_state(str(policy)).result()
            self.loaded = policy
        return self.client.save_weights_and_get_sampling_client()


def round_data(
    examples: Sequence[Datum], batch_size: int, seed: Sequence[int], first_step: int, num_steps: int
) -> DrawnDataset[Datum]:
    """Batches by absolute step. From `first_step` on they cycle through the examples, in an order
    given by (seed, pass).
    """
    size = len(examples)

    def draw(epoch: int, step: int) -> list[Datum]:
        start = (step - first_step) * batch_size
        passes = range(start // size, (start + batch_size - 1) // size + 1)
        orders = {p: np.random.default_rng([*seed, p]).permutation(size) for p in passes}
        return [examples[orders[i // size][i % size]] for i in range(start, start + batch_size)]

    return DrawnDataset(draw, num_steps)


@dataclass
class Round:
    """Round `number` of a method in its folder."""

    lab: Lab
    name: str
    method: Method
    plan: Plan
    number: int

    @property
    def config(self) -> Config:
        return self.lab.config

    @property
    def folder(self) -> Path:
        return self.config.folder / self.name / f"round_{self.number:02d}"

    def policy(self, number: int) -> Path:
        """The checkpoint at the end of round `number`."""
        if number == 0:
            return policy_path(self.config)
        if not self.method.keep_optimizer:
            return self.config.folder / self.name / f"round_{number:02d}" / "train" / "checkpoints" / "final"
        step = "final" if number == self.config.rounds else f"{number * self.steps:06d}"
        return self.config.folder / self.name / "train" / "checkpoints" / step

    @property
    def steps(self) -> int:
        return self.config.steps * self.method.step_factor

    def seed(self, stream: int) -> list[int]:
        return [self.config.seed, self.number, stream]

    def pool(
        self, stream: int, name: str, queries: Sequence[Query], temperatures: Sequence[str], num_samples: int
    ) -> Pool:
        title = f"{self.name} round {self.number} {name}"
        return Pool(
            title,
            queries,
            temperatures,
            num_samples,
            self.lab.task.max_tokens,
            self.seed(stream),
            self.config.chunk_sequences,
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Logs the stage's seconds; those of a killed attempt are not counted."""
        start = time.perf_counter()
        yield
        append_jsonl(self.folder / "seconds.jsonl", {"stage": name, "seconds": time.perf_counter() - start})

    # --- the stages ------------------------------------------------------------------------------

    async def run(self) -> None:
        if (self.folder / "summary.json").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        drop_torn_line(self.folder / "seconds.jsonl")
        if self.number:
            results = {
                self.sweep: scores_path(self.folder / "sweep.jsonl"),
                self.choose: self.folder / "choice.json",
                self.sample: self.folder / "samples.jsonl",
                self.score: scores_path(self.folder / "samples.jsonl"),
                self.select: self.folder / "selection.jsonl",
                self.train: self.policy(self.number),
            }
            for make, result in results.items():
                if not result.exists() and (make != self.sweep or self.plan.sweep):
                    with self.stage(make.__name__):
                        await make()
        if self.is_evaluated:
            await self.evaluate()
        self.summarise()

    async def sweep(self) -> None:
        """Samples and scores the dev subset at every temperature."""
        dev = [self.lab.task.train[i] for i in self.lab.task.dev]
        pool = self.pool(SWEEP, "sweep", dev, self.temperatures, self.config.samples)
        candidates = await sample_pool(
            self.lab.sampler(self.policy(self.number - 1)), pool, self.folder / "sweep.jsonl"
        )
        write_scores(self.folder / "sweep.jsonl", await self.score_candidates(candidates, dev))

    @property
    def temperatures(self) -> list[str]:
        return self.config.temperatures if self.method.temperature is None else [self.method.temperature]

    @property
    def thresholds(self) -> list[str]:
        return self.config.thresholds if self.method.threshold is None else [self.method.threshold]

    def target_size(self, num_queries: int) -> int:
        return math.ceil(self.config.wanted(self.lab.task) * num_queries)

    async def score_candidates(self, candidates: Sequence[Candidate], queries: Sequence[Query]) -> list[Candidate]:
        return await self.lab.rewards[self.method.reward](candidates, {query.problem.id: query for query in queries})

    async def choose(self) -> None:
        """Temperature and threshold with the best balance score on the dev subset."""
        if self.method.temperature is not None and self.method.threshold is not None:
            write_choice(self.folder / "choice.json", Choice(self.method.temperature, self.method.threshold, None, []))
            return
        candidates = read_candidates(self.folder / "sweep.jsonl")
        ids = [self.lab.task.train[i].problem.id for i in self.lab.task.dev]
        counts_by_cell: dict[tuple[str, str], list[Counts]] = {}
        for temperature in {candidate.temperature for candidate in candidates}:
            group = [candidate for candidate in candidates if candidate.temperature == temperature]
            for threshold in self.thresholds:
                counts_by_cell[temperature, threshold] = counts(
                    select(group, ids, threshold, self.target_size(len(ids)), self.config.quota)
                )
        cells = surface(
            counts_by_cell,
            self.temperatures,
            self.thresholds,
            self.method.n_star or self.config.n_star or math.ceil(self.config.wanted(self.lab.task)),
        )
        best = choose(cells)
        write_choice(self.folder / "choice.json", Choice(best.temperature, best.threshold, best.score, cells))

    async def sample(self) -> None:
        choice = read_choice(self.folder / "choice.json")
        pool = self.pool(SAMPLE, "samples", self.lab.task.train, [choice.temperature], self.plan.samples_per_query)
        await sample_pool(self.lab.sampler(self.policy(self.number - 1)), pool, self.folder / "samples.jsonl")

    async def score(self) -> None:
        candidates = read_candidates(self.folder / "samples.jsonl")
        write_scores(self.folder / "samples.jsonl", await self.score_candidates(candidates, self.lab.task.train))

    async def select(self) -> None:
        choice, queries = read_choice(self.folder / "choice.json"), self.lab.task.train
        human = (
            {query.problem.id: query.problem.solution for query in queries if query.problem.solution is not None}
            if self.config.human_solutions
            else {}
        )
        chosen = select(
            read_candidates(self.folder / "samples.jsonl"),
            [query.problem.id for query in queries],
            choice.threshold,
            self.target_size(len(queries)),
            self.config.quota,
            human,
        )
        if missing := self.shortfall(chosen.values()):
            print(
                f"{self.name} round {self.number}: {missing} solutions fewer than wanted were selected: too few "
                f"distinct ones are above the threshold {choice.threshold}; sample more, or lower it",
                flush=True,
            )
        write_selection(self.folder / "selection.jsonl", [line for q in queries for line in chosen[q.problem.id]])

    def shortfall(self, selection: Iterable[Sequence[Selected]]) -> int:
        """Solutions missing from the target size; 0 if a quota is set, which has no target."""
        return 0 if self.config.quota else shortfall(selection, self.target_size(len(self.lab.task.train)))

    async def train(self) -> None:
        """Trains on the selection, from the last weights or from the warm start."""
        selected, config = read_selection(self.folder / "selection.jsonl"), self.config
        if not selected:
            raise DataError(
                f"{self.folder}/selection.jsonl is empty: no sample is above the threshold; sample more, or lower it"
            )
        keep = self.method.keep_optimizer  # one run: only its first round loads another run's checkpoint
        start = self.policy(self.number - 1 if self.method.start == "last" and not keep else 0)
        first, total = ((self.number - 1) * self.steps, config.rounds * self.steps) if keep else (0, self.steps)
        dataset = round_data(self.data(selected), config.batch_size, [config.seed, self.number], first, total)
        run = supervised_train.Config(
            dataset=SupervisedDatasetBuilder(batch_size=config.batch_size, seed=config.seed),
            model_name=config.model_name,
            load_checkpoint_path=str(start),
            renderer_name=config.renderer_name,
            lora_rank=config.lora_rank,
            seed=config.seed,
            learning_rate=config.learning_rate,
            lr_schedule=config.lr_schedule,
            grad_clip_norm=config.grad_clip_norm,
            eval_every=0,
            save_every=config.save_every,
            keep_checkpoints=1,
            log_path=str(self.train_folder),
            behavior_if_log_dir_exists="resume",
            backend=config.backend,
        )
        folder = open_run_folder(run.log_path, "resume", run)
        self.lab.loaded = None
        objective = supervised_train.CrossEntropy()
        await supervised_train.training_loop(
            run, folder, self.lab.client, dataset, objective, None, until=first + self.steps
        )

    @property
    def train_folder(self) -> Path:
        return self.folder.parent / "train" if self.method.keep_optimizer else self.folder / "train"

    def data(self, selected: Sequence[Selected]) -> list[Datum]:
        """A sampled solution is its sampled tokens, stop included; a human one is rendered."""
        queries = {query.problem.id: query for query in self.lab.task.train}
        samples = {(c.query, c.sample): c.tokens for c in read_candidates(self.folder / "samples.jsonl")}
        data = []
        for line in selected:
            if line.sample is None:
                data.append(conversation_to_datum(queries[line.query].messages(), self.lab.renderer))
            else:
                prompt, tokens = queries[line.query].build_prompt().to_ints(), samples[line.query, line.sample]
                data.append(datum_from_tokens_weights([*prompt, *tokens], [0.0] * len(prompt) + [1.0] * len(tokens)))
        return data

    @property
    def is_evaluated(self) -> bool:
        return self.number % self.config.eval_every == 0 or self.number == self.config.rounds

    async def evaluate(self) -> None:
        """Test set: one greedy answer, and `eval_samples` samples, per query."""
        test, config = self.lab.task.test, self.config
        jobs = [("greedy", GREEDY, "0", 1), ("test", TEST, config.eval_temperature, config.eval_samples)]
        for name, stream, temperature, num_samples in jobs:
            file = self.folder / f"{name}.jsonl"
            if not scores_path(file).exists():
                with self.stage(name):
                    pool = self.pool(stream, name, test, [temperature], num_samples)
                    candidates = await sample_pool(self.lab.sampler(self.policy(self.number)), pool, file)
                    queries = {query.problem.id: query for query in test}
                    write_scores(file, await self.lab.rewards["configured"](candidates, queries))

    # --- the round in numbers --------------------------------------------------------------------

    def summarise(self) -> None:
        metrics, tokens = self.test_results() if self.is_evaluated else ({}, {})
        choice = None
        if self.number:
            choice = read_choice(self.folder / "choice.json")
            metrics |= {f"train/{key}": value for key, value in self.training_metrics().items()}
            tokens |= {
                "sweep": _tokens(read_candidates(self.folder / "sweep.jsonl")),
                "sample": _tokens(read_candidates(self.folder / "samples.jsonl")),
                "train": self.tokens_trained_on(),
            }
        seconds: dict[str, float] = {}
        for line in read_jsonl(self.folder / "seconds.jsonl"):
            seconds[line["stage"]] = seconds.get(line["stage"], 0.0) + line["seconds"]
        taken = (choice.temperature, choice.threshold, choice.score) if choice else (None, None, None)
        write_summary(self.folder / "summary.json", Summary(self.number, *taken, metrics, seconds, tokens))
        settings = f" T {taken[0]} threshold {taken[1]}" if choice else ""
        shown = [f"test/{key}" for key in ("greedy", "pass@1", f"pass@{self.config.eval_samples}")]
        results = ", ".join(f"{key[5:]} {metrics[key]:.3f}" for key in shown if key in metrics)
        print(f"{self.name} round {self.number}:{settings}  {results}", flush=True)

    def test_results(self) -> tuple[Metrics, dict[str, int]]:
        """Metrics of the test set, and its sampled tokens."""
        ids = [query.problem.id for query in self.lab.task.test]
        greedy, test = (read_candidates(self.folder / f"{name}.jsonl") for name in ("greedy", "test"))
        metrics = {"test/greedy": float(np.mean([candidate.correct for candidate in greedy]))}
        metrics |= {f"test/{key}": value for key, value in sample_metrics(test, ids, self.lab.task.form).items()}
        return metrics, {"greedy": _tokens(greedy), "test": _tokens(test)}

    def training_metrics(self) -> Metrics:
        ids = [query.problem.id for query in self.lab.task.train]
        metrics = sample_metrics(read_candidates(self.folder / "samples.jsonl"), ids, self.lab.task.form)
        by_query: dict[str, list[Selected]] = {query: [] for query in ids}
        for line in read_selection(self.folder / "selection.jsonl"):
            by_query[line.query].append(line)
        missing = float(self.shortfall(by_query.values()))
        return metrics | selection_metrics(list(by_query.values())) | {"selected_shortfall": missing}

    def tokens_trained_on(self) -> int:
        first = (self.number - 1) * self.steps if self.method.keep_optimizer else 0
        records = read_metrics(self.train_folder)[first : first + self.steps]
        return int(sum(record["num_tokens"] for record in records))


def _tokens(candidates: Sequence[Candidate]) -> int:
    return sum(len(candidate.tokens) for candidate in candidates)


async def run_method(open_lab: Callable[[], Lab], name: str, plan: Plan) -> None:
    """All rounds of a method. Round 0 is shared by the methods: its summary is copied."""
    lab = open_lab()
    first = lab.config.folder / name / "round_00"
    if not (first / "summary.json").exists():
        first.mkdir(parents=True, exist_ok=True)
        write_atomically(first / "summary.json", (lab.config.folder / "round_00" / "summary.json").read_text())
    for number in range(1, lab.config.rounds + 1):
        await Round(lab, name, METHODS[name], plan, number).run()
