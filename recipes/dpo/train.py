"""DPO (Rafailov et al. 2023) and RPO (DPO plus the likelihood of the chosen answers), from the same
warm start on the same pairs.

    python recipes/dpo/train.py                       # 90 s of one core; runs/dpo_recipe
    python recipes/dpo/train.py num_epochs=2 nll_coef=0.2 seed=1 log_path=runs/again

DPO may lower the likelihood of both answers, so that the policy gives neither; RPO keeps the chosen
one likely. A plot and a table of sampled answers show it. Left out: pairs sampled from the policy.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from pathlib import Path

import chz

from posttrain.backend.config import BackendConfig
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE, POSITIVE, SEED
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import SamplingParams
from posttrain.renderers import get_renderer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.metrics_log import read_last_metrics
from posttrain.tracking.plots import compare_runs
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.run_folder import BehaviorIfExists
from posttrain.tracking.stages import Stage, run_stages, training_stage
from preference import train_dpo
from preference.losses import DPO, RPO
from recipes.dpo.letters import RandomOrderBuilder, SortedPreferredBuilder
from recipes.results import write_results
from recipes.warm_start import shared_settings, torch_backend, warm_start

RENDERER = "plain"


@chz.chz
class Config:
    """DPO against RPO on letters that should be answered in alphabetical order."""

    warm_start_nll: float = chz.field(
        default=0.72, validator=NON_NEGATIVE, doc="imitate random orders until a batch's loss is below this"
    )
    learning_rate: float = chz.field(default=1e-4, validator=LEARNING_RATE, doc="constant")
    num_epochs: int = chz.field(default=8, validator=COUNT, doc="passes over the pairs")
    beta: float = chz.field(default=0.1, validator=POSITIVE, doc="KL strength of both losses")
    nll_coef: float = chz.field(
        default=1.0, validator=NON_NEGATIVE, doc="RPO's weight of the chosen answer's likelihood"
    )
    seed: int = chz.field(default=0, validator=SEED, doc="seed of the model, the questions and their order")
    log_path: str = log_path_field("runs/dpo_recipe", "folder of the runs: warm_start, dpo and rpo")
    behavior_if_log_dir_exists: BehaviorIfExists = chz.field(default="ask", doc="what to do with existing run folders")
    backend: BackendConfig = torch_backend("how this machine trains")


def stages_of(config: Config) -> list[Stage]:
    folder, common, behavior = Path(config.log_path), shared_settings(config), config.behavior_if_log_dir_exists
    orders, nll = RandomOrderBuilder(seed=config.seed), config.warm_start_nll
    start = warm_start(
        config, orders, folder / "warm_start", renderer_name=RENDERER, stop_at_nll=nll, eval_every=50, save_every=100
    )
    stages = [start]
    for name, method in {"dpo": DPO(beta=config.beta), "rpo": RPO(beta=config.beta, nll_coef=config.nll_coef)}.items():
        run = train_dpo.Config(
            dataset=SortedPreferredBuilder(seed=config.seed),
            method=method,
            load_checkpoint_path=str(start.result),
            learning_rate=config.learning_rate,
            lr_schedule="constant",
            num_epochs=config.num_epochs,
            renderer_name=RENDERER,
            data_seed=config.seed,
            eval_every=8,
            log_path=str(folder / name),
            **common,
        )
        stages.append(training_stage(name, train_dpo.main, run, [start], behavior))
    return stages


async def answers(config: Config, stage: Stage) -> dict[str, float]:
    """Shares of a policy's answers to the held-out questions, one sample each."""
    renderer = get_renderer(RENDERER, load_tokenizer("tiny"))
    stop = renderer.get_stop_sequences()
    _, held_out = SortedPreferredBuilder(seed=config.seed)()
    prompts = [renderer.build_generation_prompt(labeled.comparison.prompt_conversation) for labeled in held_out]
    with ServiceClient(config.backend) as service:
        client = service.create_sampling_client(model_path=str(stage.result))
        futures = [client.sample(prompt, 1, SamplingParams(8, seed=i, stop=stop)) for i, prompt in enumerate(prompts)]
        sampled = [(await future).sequences[0].tokens for future in futures]
    texts = [renderer.parse_response(tokens)[0]["content"] for tokens in sampled]
    letters = [labeled.comparison.completion_A[0]["content"] for labeled in held_out]
    in_order = sum(text == right for text, right in zip(texts, letters, strict=True)) / len(texts)
    same = sum("".join(sorted(text)) == right for text, right in zip(texts, letters, strict=True)) / len(texts)
    return {"in order": in_order, "the letters in another order": same - in_order, "anything else": 1 - same}


async def main(config: Config) -> None:
    stages = stages_of(config)
    await run_stages(stages)
    for stage in stages[1:]:
        metrics = read_last_metrics(stage.path)
        held_out = {key: metrics[f"test/{key}"] for key in ("accuracy", "chosen_logprob", "rejected_logprob")}
        print(f"{stage.name}: held out " + ", ".join(f"{key} {value:.3f}" for key, value in held_out.items()))
    results = {}
    for stage in stages:
        shares = await answers(config, stage)
        print(f"{stage.name:12} " + "   ".join(f"{kind} {share:6.1%}" for kind, share in shares.items()))
        results |= {f"{stage.name}: {kind}": share for kind, share in shares.items()}
    write_results(config.log_path, results)
    keys = ("test/chosen_logprob", "test/rejected_logprob", "test/accuracy")
    print(f"picture: {compare_runs([stage.path for stage in stages[1:]], Path(config.log_path, 'dpo.png'), keys)}")


if __name__ == "__main__":
    run_command(main, Config)
