"""Block `belief_state`: steps per second of the Belief State Transformer on the star graph G(5,5),
at the paper's size and batch.

"recipe": the pairs of the path alone, as recipes/belief_state/train.py trains. "all pairs": those
of the whole row, about a million.
"""

import time

import chz

from benchmarks.gpu.checks import Record
from benchmarks.gpu.timing import attempt, peak_gib, seconds
from posttrain.backend.config import training_device
from posttrain.tracking.command_line import parse
from recipes.belief_state import train

TOY = ["hidden=32", "num_heads=2", "num_layers=1", "batch_size=8", "data.num_test=10"]
PAPER = ["data.num_paths=5", "data.path_length=5", "preset=star_graph"]


def config(options: list[str]) -> train.Config:
    toy = [] if training_device().type == "cuda" else TOY
    return parse(train.Config, PAPER + toy + options, {"data": train.SOURCES}, {"preset": train.PRESETS})


def speed(settings: train.Config, steps: int, all_pairs: bool = False) -> dict[str, float]:
    source = settings.data(settings.batch_size, settings.seed)
    trainer = train.make_trainer(settings, source)
    if all_pairs:
        trainer.objective = chz.replace(trainer.objective, context_length=0)
    start = time.perf_counter()
    batches = [source.get_batch(step) for step in range(steps + 3)]
    making = (time.perf_counter() - start) / len(batches)
    losses, pairs = [], 0.0

    def step(index: int) -> None:
        nonlocal pairs
        metrics = trainer.forward_backward(batches[index], (settings.seed, index))
        losses.append(metrics["loss"])
        pairs = metrics["num_pairs"]
        trainer.optim_step(settings.adam(index, settings.num_steps))

    for index in range(3):
        step(index)
    taken = seconds(lambda: [step(index) for index in range(3, steps + 3)])
    return {
        "steps/s": steps / taken,
        "making a batch, ms": 1e3 * making,
        "pairs": pairs,
        "first loss": losses[0],
        "last loss": losses[-1],
        "GiB": peak_gib(),
    }


def main() -> None:
    record, cuda = Record(), training_device().type == "cuda"
    many, few = (100, 10) if cuda else (5, 2)
    found = attempt(record, "recipe", lambda: speed(config([]), many))
    record.figure("steps/s", found["steps/s"] if isinstance(found, dict) else None)
    for chunk in (32768, 131072):
        settings = config([f"passes.pairs_per_chunk={chunk}"])
        attempt(record, f"all pairs, {chunk} per chunk", lambda settings=settings: speed(settings, few, all_pairs=True))
    if cuda:
        attempt(record, "recipe, compiled", lambda: speed(config(["passes.compile=True"]), few))
    record.print()


if __name__ == "__main__":
    main()
