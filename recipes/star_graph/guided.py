"""Q# and controlled decoding (CD) on star graphs: trains one classifier for a frozen next-token
policy and decodes with both methods; results in GUIDANCE.md.

    python recipes/star_graph/guided.py policy_path=runs/star_graph/gpt/checkpoints/final
    python recipes/star_graph/guided.py policy_path=... trunk=runs/star_graph/bst/checkpoints/final

Differs from Q#'s train_classifier.py: fresh graphs, a constant learning rate, no weight decay.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import json
import math
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import chz
import torch
from torch.nn.functional import cross_entropy

from envs.star_graph_data import Batches, StarGraphTask
from envs.star_graph_tokens import Layout, layout_of
from posttrain.backend.config import training_device
from posttrain.backend.errors import DataError, NonFiniteError
from posttrain.backend.models import load_model
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE, POSITIVE, SEED, WHOLE
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.jsonl import write_atomically, write_jsonl
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run import Metrics, Run
from posttrain.tracking.run_config import RunConfig, log_path_field
from posttrain.tracking.run_folder import RunFolder, open_run_folder
from posttrain.tracking.seeds import GUIDED, GUIDED_PAIRS
from recipes.belief_state.star_graph import task_name
from recipes.libraries.belief_state.files import CONFIG_FILE as BELIEF_STATE_FILE
from recipes.libraries.belief_state.files import load_belief_state
from recipes.libraries.value_guidance.guidance import Guidance, Method
from recipes.libraries.value_guidance.guided_sampler import LanguageModelTrunk, Reader, check_fit, language_model
from recipes.star_graph.classifier import (
    BeliefStateTrunk,
    Classifier,
    Head,
    collect_pairs,
    judged_right,
    load_optimizer,
    load_weights,
    new_trunk,
    save_classifier,
    value_loss,
)
from recipes.star_graph.guided_accuracy import Row, decode, format_table, guidance_table
from recipes.star_graph.model import check_model

FOLDERS: dict[Method, str] = {"q_sharp": "qsharp", "cd": "cd"}


@chz.chz
class Config(RunConfig):
    """Value-guided decoding on star graphs: trains a classifier, evaluates Q# and CD with it."""

    policy_path: str = chz.field(doc="folder of the guided next-token policy, which stays frozen")
    task: StarGraphTask = chz.field(default_factory=StarGraphTask, doc="the graphs, and which are held out")
    trunk: str = chz.field(
        default="scratch",
        doc="the classifier's trunk: 'scratch' (the policy's architecture, random weights), 'policy' (its weights), "
        "or the folder of a Belief State Transformer (its forward encoder) or of another language model",
    )
    head: Head = chz.field(
        default="bilinear", doc="linear: the original's; bilinear also reads the state before the token"
    )
    train_trunk: bool = chz.field(default=True, doc="False trains the head only")
    num_outputs: int = chz.field(
        default=1, validator=COUNT, doc="1: a Bernoulli return; K >= 2: a distribution over K returns from 0 to 1"
    )
    next_token_coef: float = chz.field(
        default=0.0,
        validator=NON_NEGATIVE,
        doc="weight of an additional next-token loss of both paths; 0 in the original",
    )
    guidance: Guidance = chz.field(
        default_factory=Guidance, doc="kl_coef, top_k, ...; `method` is ignored: all methods are evaluated"
    )
    kl_coefs: list[float] = chz.field(
        default_factory=lambda: [0.1, 1.0], validator=POSITIVE, doc="kl_coefs of the final table"
    )

    num_steps: int = chz.field(default=500, validator=COUNT, doc="optimizer steps")
    batch_size: int = chz.field(default=64, validator=COUNT, doc="graphs per step, each with a right and a wrong path")
    max_tries: int = chz.field(
        default=8,
        validator=COUNT,
        doc="samples per graph until one is wrong; a graph without a wrong sample is dropped",
    )
    learning_rate: float = chz.field(default=3e-3, validator=LEARNING_RATE, doc="after the warm-up")
    warmup_steps: int = chz.field(default=30, validator=WHOLE, doc="steps of linear warm-up")
    weight_decay: float = chz.field(default=0.0, validator=NON_NEGATIVE, doc="AdamW's, decoupled")
    grad_clip_norm: float = chz.field(
        default=1.0, validator=NON_NEGATIVE, doc="of all gradients together; 0 = no clipping"
    )
    seed: int = chz.field(default=0, validator=SEED, doc="of the classifier's weights, its pairs, and sampled decoding")

    eval_every: int = chz.field(
        default=100, validator=COUNT, doc="guided accuracy before every this many steps, and at the end"
    )
    save_every: int = chz.field(
        default=250, validator=COUNT, doc="checkpoint after every this many steps, and at the end"
    )
    log_path: str = log_path_field("runs/star_graph_guided")


async def main(config: Config) -> list[Row]:
    """Trains or resumes; returns the rows of the final table. Run folder: log_path/classifier;
    accuracy by step: log_path/qsharp and log_path/cd.
    """
    config.task.check_measured()
    graph, device = config.task.graph(), training_device()
    rows_D_T, test = config.task.split()
    check_model(config.policy_path, graph)
    layout = layout_of(load_tokenizer(config.policy_path), graph)
    policy = language_model(load_model(config.policy_path, 0, device, torch.float32).requires_grad_(False))
    model = _new_classifier(config, policy, device)
    check_fit(policy.trunk, model.trunk, layout.length)
    batches = Batches(graph, test, rows_D_T, config.batch_size, config.num_steps, (config.seed, GUIDED))
    folder = open_run_folder(Path(config.log_path) / "classifier", config.behavior_if_log_dir_exists, config)
    trainer = Trainer(config, layout, policy, model, batches)
    test_ids_B_T = torch.from_numpy(layout.encode(test.tokens_B_T)).to(device)
    await _train(config, folder, trainer, test_ids_B_T)
    rows = guidance_table(policy, model.reader(), config.guidance, config.kl_coefs, test_ids_B_T, layout, config.seed)
    write_atomically(Path(config.log_path) / "guidance.json", json.dumps(rows, indent=1))
    print(format_table(rows))
    return rows


def _new_classifier(config: Config, policy: Reader, device: torch.device) -> Classifier:
    assert isinstance(policy.trunk, LanguageModelTrunk)
    if config.trunk in ("scratch", "policy"):
        trunk = new_trunk(policy.trunk, config.trunk == "policy", config.seed)
    elif (Path(config.trunk) / BELIEF_STATE_FILE).exists():
        trunk = BeliefStateTrunk(load_belief_state(config.trunk, task_name(config.task.graph())))
    else:
        trunk = LanguageModelTrunk(load_model(config.trunk, 0, device, torch.float32))
    return Classifier(trunk, config.num_outputs, config.head, config.seed).to(device)


# --- training -----------------------------------------------------------------------------------


class Trainer:
    """A classifier and its optimizer; a training step is a function of its number."""

    def __init__(self, config: Config, layout: Layout, policy: Reader, model: Classifier, batches: Batches):
        self.config, self.layout, self.policy, self.model, self.batches = config, layout, policy, model, batches
        self.device = model.head.out.weight.device
        model.trunk.requires_grad_(config.train_trunk)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=0.0, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
        )

    def pairs(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = divmod(step, len(self.batches))
        seed = (self.config.seed, GUIDED_PAIRS, step)
        rows_B_T = self.batches.rows(index, epoch)
        return collect_pairs(self.policy, self.layout, rows_B_T, seed, self.device, self.config.max_tries)

    def step(self, step: int) -> Metrics:
        prefixes_B_P, paths_2B_L = self.pairs(step)
        if not len(prefixes_B_P):
            raise DataError(
                f"step {step}: all paths of the policy are right in {self.config.max_tries} tries: nothing to guide"
            )
        loss, metrics = self.loss(prefixes_B_P, paths_2B_L)
        self.optimizer.zero_grad()
        loss.backward()
        metrics["optim/grad_norm"] = float(
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip_norm or math.inf)
        )
        if not math.isfinite(metrics["optim/grad_norm"]):
            raise NonFiniteError(
                f"step {step}: loss {loss.item()}, gradient norm not finite; no weight was changed. Lower learning_rate"
            )
        metrics["learning_rate"] = self.config.learning_rate * min(1.0, (step + 1) / max(self.config.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = metrics["learning_rate"]
        self.optimizer.step()
        return metrics

    def save_state(self, name: str, *, extra: dict[str, Any]) -> "Future[None]":
        save_classifier(Path(name), self.model, self.optimizer, extra)
        return _done()

    def load_state(self, path: str) -> "Future[None]":
        load_weights(Path(path), self.model)
        return _done()

    def load_state_with_optimizer(self, path: str) -> "Future[None]":
        load_weights(Path(path), self.model)
        load_optimizer(Path(path), self.model, self.optimizer)
        return _done()

    def checkpoint_bytes(self) -> int:
        # fp32 weights and two moments of each
        return 12 * sum(parameter.numel() for parameter in self.model.parameters())

    def loss(self, prefixes_B_P: torch.Tensor, paths_2B_L: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        returns_2B = torch.arange(len(paths_2B_L), device=self.device) < len(prefixes_B_P)
        metrics: Metrics = {"num_pairs": len(prefixes_B_P)}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            values_2B_L_K, before_2B_L_H = self.model(prefixes_B_P, paths_2B_L)
            nll_2B_L = value_loss(values_2B_L_K, returns_2B.float())
            loss = nll_2B_L.mean()
            if self.config.next_token_coef:
                logits_2B_L_V = self.model.trunk.next_token_logits(before_2B_L_H).float()
                next_token = cross_entropy(logits_2B_L_V.flatten(0, 1), paths_2B_L.flatten())
                loss = loss + self.config.next_token_coef * next_token
                metrics["classifier/next_token_nll"] = next_token.item()
        right_2B_L = judged_right(values_2B_L_K) == returns_2B[:, None]
        metrics["classifier/nll"] = nll_2B_L.mean().item()
        for k, node in enumerate(self.layout.nodes_L, start=1):
            metrics[f"classifier/nll_node_{k}"] = nll_2B_L[:, node].mean().item()
            metrics[f"classifier/accuracy_node_{k}"] = right_2B_L[:, node].float().mean().item()
        return loss, metrics


def _done() -> "Future[None]":
    future: Future[None] = Future()
    future.set_result(None)
    return future


async def _train(config: Config, folder: RunFolder, trainer: Trainer, test_ids_B_T: torch.Tensor) -> None:
    async def evaluate(step: int) -> Metrics:
        return _evaluate(config, trainer, test_ids_B_T)

    async def step(number: int, metrics: Metrics) -> None:
        metrics |= trainer.step(number)

    run = Run(
        config=config,
        folder=folder,
        client=trainer,
        name="classifier",
        num_steps=config.num_steps,
        headline=HEADLINE,
        evaluate=evaluate,
    )
    if run.start(None):
        await run.steps(step)
    _write_method_folders(config, folder)


HEADLINE = {
    "classifier/nll": "nll",
    "classifier/accuracy_node_2": "first hop judged",
    "q_sharp/first_hop": "Q#",
    "cd/first_hop": "CD",
}


def _evaluate(config: Config, trainer: Trainer, test_ids_B_T: torch.Tensor) -> Metrics:
    metrics: Metrics = {}
    for method in FOLDERS:
        guidance = chz.replace(config.guidance, method=method)
        accuracy = decode(trainer.policy, trainer.model.reader(), guidance, test_ids_B_T, trainer.layout)
        metrics |= {f"{method}/{name}": value for name, value in accuracy.items()}
    return metrics


def _write_method_folders(config: Config, run: RunFolder) -> None:
    """Each method's accuracy in its own metrics.jsonl, as the recipe's other methods have one."""
    for method, name in FOLDERS.items():
        lines = []
        for record in read_metrics(run.path):
            accuracy = {key: value for key, value in record.items() if key.startswith(f"{method}/")}
            if accuracy:
                renamed = {key.replace(f"{method}/", "test/"): value for key, value in accuracy.items()}
                lines.append({"step": record["step"], **renamed})
        folder = Path(config.log_path) / name
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / "metrics.jsonl", lines)


if __name__ == "__main__":
    run_command(main, Config)
