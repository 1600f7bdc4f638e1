"""Samples a pool of candidates into a file, one chunk of queries at a time; a kill loses one chunk.

A sample depends on the seed, the temperature, the chunk's place in the pool and the sample's place
in the chunk, so a resumed run gives the same candidates. A grader gets three tries; then its error
ends the command, which resumes after the last whole chunk.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np

from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.types import SamplingParams
from posttrain.tracking.progress import TrainingProgress
from preference.solutions import sample_and_grade, sampling_seeds
from recipes.bstar.records import Candidate, candidate_line, read_candidates
from recipes.bstar.tasks import Query

GRADER_TRIES = 3


@dataclass(frozen=True)
class Pool:
    """What to sample: `num_samples` of each query at each temperature."""

    name: str  # title of the progress bar
    queries: Sequence[Query]
    temperatures: Sequence[str]
    num_samples: int
    max_tokens: int
    seed: Sequence[int]
    chunk_sequences: int = 1024  # approximate number of sequences per engine call

    def chunks(self) -> list[tuple[str, Sequence[Query]]]:
        size = max(1, self.chunk_sequences // self.num_samples)
        starts = range(0, len(self.queries), size)
        return [
            (temperature, self.queries[start : start + size]) for temperature in self.temperatures for start in starts
        ]


async def sample_pool(client: SamplingClient, pool: Pool, path: Path) -> list[Candidate]:
    """Candidates in the order of temperatures, queries and samples: read from `path` if it exists,
    else sampled and written there.
    """
    if (finished := _on_disk(path)) is not None:
        return finished
    unfinished = path.with_name(f"{path.stem}.unfinished.jsonl")
    done, chunks = read_candidates(unfinished), pool.chunks()
    sizes = [len(queries) * pool.num_samples for _, queries in chunks]
    first = next((n for n in range(len(chunks) + 1) if sum(sizes[: n + 1]) > len(done)), len(chunks))
    candidates, kept = done[: sum(sizes[:first])], sum(sizes[:first])
    with unfinished.open("w", encoding="utf-8") as file, TrainingProgress(len(chunks), first, pool.name) as progress:
        file.writelines(map(candidate_line, candidates))
        for n, (temperature, queries) in enumerate(chunks[first:], start=first):
            candidates += await _sample_chunk(client, pool, n, temperature, queries)
            file.writelines(map(candidate_line, candidates[kept:]))
            file.flush()
            os.fsync(file.fileno())
            kept = len(candidates)
            progress.update(n, {"right": float(np.mean([candidate.correct for candidate in candidates]))})
    unfinished.rename(path)
    return candidates


def _on_disk(path: Path) -> list[Candidate] | None:
    return read_candidates(path) if path.exists() else None


async def _sample_chunk(
    client: SamplingClient, pool: Pool, number: int, temperature: str, queries: Sequence[Query]
) -> list[Candidate]:
    thousandths = int(Decimal(temperature) * 1000)
    seeds = sampling_seeds([*pool.seed, thousandths, number], len(queries))
    params = SamplingParams(pool.max_tokens, temperature=float(temperature))
    responses = await sample_and_grade(client, queries, pool.num_samples, params, seeds, GRADER_TRIES)
    return [
        Candidate(
            query.problem.id, n, temperature, r.text, r.tokens, r.answer, r.correct, "stop" if r.ended else "length"
        )
        for query, group in zip(queries, responses, strict=True)
        for n, r in enumerate(group)
    ]
