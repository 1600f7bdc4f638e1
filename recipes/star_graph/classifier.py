"""The classifier of Q# and CD on star graphs: predicts at each token the return of the whole path.

Differs from Q#'s train_classifier.py: fresh pairs in every step; an optional bilinear head, trunk
of a Belief State Transformer, and next-token loss (GUIDANCE.md). Left out: pairs sampled from the
guided policy.
"""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from envs.star_graph_tokens import Layout
from posttrain.backend import optimizer_state
from posttrain.backend.atomic_folder import atomic_folder
from posttrain.backend.checkpoint_files import OPTIMIZER_FILE, STATE_FOLDER, state_file, tensor_shapes, write_state
from posttrain.backend.errors import CheckpointError
from posttrain.backend.random_state import drawn_from
from recipes.libraries.belief_state.blocks import KVCache
from recipes.libraries.belief_state.model import BeliefState, BeliefStateConfig
from recipes.libraries.value_guidance.guidance import Guidance, log_pmf
from recipes.libraries.value_guidance.guided_sampler import LanguageModelTrunk, Reader, ValueReader, guided_sample

CLASSIFIER_FILE, WEIGHTS_FILE = "classifier.json", "classifier.safetensors"


class BeliefStateTrunk(nn.Module):
    """The forward encoder of a Belief State Transformer."""

    max_length = None

    def __init__(self, model: BeliefState):
        super().__init__()
        self.model = model
        self.vocab_size, self.hidden_size = model.config.vocab_size, model.config.hidden

    def read(self, tokens_B_T: torch.Tensor, cache: KVCache | None = None) -> tuple[torch.Tensor, KVCache]:
        cache = list(cache or [])
        position = 1 + (cache[0][0].shape[2] if cache else 0)  # position 0 is an EOS before the row
        return self.model.extend(self.model.forward_encoder, tokens_B_T, position, cache), cache

    def select(self, cache: KVCache, rows: torch.Tensor) -> KVCache:
        return [(keys[rows], values[rows]) for keys, values in cache]

    def next_token_logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.model.text_head(states, self.model.empty_suffix().expand_as(states))[0]


class LinearHead(nn.Module):
    """The original's head: reads the state after the token."""

    def __init__(self, hidden: int, num_outputs: int):
        super().__init__()
        self.out = nn.Linear(hidden, num_outputs)

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return self.out(after)


class BilinearHead(nn.Module):
    """Also reads products of the states before and after the token: the state after a token need
    not hold whether it was the expected token.
    """

    def __init__(self, hidden: int, num_outputs: int):
        super().__init__()
        self.before, self.behind = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.out = nn.Linear(2 * hidden, num_outputs)

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([self.before(before) * self.behind(after), after], dim=-1))


Head = Literal["linear", "bilinear"]


class Classifier(nn.Module):
    """Q(s, a) of each token a, from the state after it. `num_outputs` = 1: the logit of a Bernoulli
    return; K >= 2: a distribution over K returns from 0 to 1. `seed` initialises the head.
    """

    def __init__(
        self, trunk: LanguageModelTrunk | BeliefStateTrunk, num_outputs: int = 1, head: Head = "bilinear", seed: int = 0
    ):
        super().__init__()
        self.trunk, self.num_outputs = trunk, num_outputs
        self.head_name: Head = head
        with drawn_from(seed):
            self.head = (BilinearHead if head == "bilinear" else LinearHead)(trunk.hidden_size, num_outputs)

    def reader(self) -> ValueReader:
        return ValueReader(self.trunk, self.head)

    def forward(self, prefixes_B_P: torch.Tensor, paths_2B_L: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs (2B, L, K) at the tokens of two paths per prompt, all first paths before all
        second paths, and the states (2B, L, H) before each token. The prompt is encoded once.
        """
        trunk = self.reader().trunk
        prefix_states_B_P_H, cache = trunk.read(prefixes_B_P)
        rows = torch.arange(len(prefixes_B_P), device=prefixes_B_P.device).repeat(2)
        states_2B_L_H, _ = trunk.read(paths_2B_L, trunk.select(cache, rows))
        before = torch.cat([prefix_states_B_P_H[rows, -1:], states_2B_L_H[:, :-1]], dim=1)
        return self.head(before, states_2B_L_H), before


def value_loss(values_B_L_K: torch.Tensor, returns_B: torch.Tensor) -> torch.Tensor:
    """(B, L) cross-entropies, in nats, of each token's distribution with the path's return R."""
    log_pmf_B_L_A, returns_A = log_pmf(values_B_L_K)
    label_B = (returns_B * (len(returns_A) - 1)).round().long()
    return -log_pmf_B_L_A.gather(-1, label_B[:, None, None].expand(*values_B_L_K.shape[:2], 1))[..., 0]


def judged_right(values: torch.Tensor) -> torch.Tensor:
    """Whether the expected return is above 1/2: (..., K) to bool (...)."""
    log_pmf_A, returns_A = log_pmf(values)
    return (log_pmf_A.exp() * returns_A).sum(-1) > 0.5


def collect_pairs(
    policy: Reader,
    layout: Layout,
    rows_B_T: np.ndarray,
    seed: tuple[int, ...],
    device: torch.device,
    max_tries: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """prefixes_B_P and paths_2B_L in the tokenizer's ids: B true paths (R = 1), then B wrong paths
    (R = 0), as Q#'s collect_rollouts.py. The policy samples at temperature 1 until a path is wrong;
    graphs without a wrong path in `max_tries` are dropped. `seed`, row and try determine a sample.

    Right and wrong paths are 1 : 1 whatever the policy's success rate. So probabilities are those
    of an even mix of policy and truth: rankings are the same, kl_coef is not calibrated.
    """
    ids_B_T = torch.from_numpy(layout.encode(rows_B_T)).to(device)
    prefixes_B_P, truth_B_L = ids_B_T[:, : layout.prefix_length], ids_B_T[:, layout.prefix_length :]
    wrong_B_L, waiting = truth_B_L.clone(), torch.arange(len(ids_B_T), device=device)
    for attempt in range(max_tries):
        uniforms_B_L = torch.from_numpy(np.random.default_rng((*seed, attempt)).random(truth_B_L.shape)).to(device)
        sample = guided_sample(
            policy, prefixes_B_P[waiting], truth_B_L.shape[1], Guidance(), uniforms_B_T=uniforms_B_L[waiting]
        )
        wrong_B_L[waiting] = sample.tokens_B_T
        waiting = waiting[(sample.tokens_B_T == truth_B_L[waiting]).all(1)]
        if not len(waiting):
            break
    failed_B = (wrong_B_L != truth_B_L).any(1)
    return prefixes_B_P[failed_B], torch.cat([truth_B_L[failed_B], wrong_B_L[failed_B]])


# --- trunks and files ---------------------------------------------------------------------------


def new_trunk(policy: LanguageModelTrunk, copy_weights: bool, seed: int) -> LanguageModelTrunk:
    """The policy's architecture, with its weights or with random weights from `seed`."""
    if copy_weights:
        return copy.deepcopy(policy)
    with drawn_from(seed):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(policy.model.config), dtype=torch.float32)
    return LanguageModelTrunk(model.to(policy.model.device).eval())


def save_classifier(path: Path, model: Classifier, optimizer: torch.optim.Optimizer, extra: dict[str, Any]) -> None:
    """A folder for load_classifier, with the optimizer and the run's `extra` in training_state/."""
    about: dict[str, Any] = {"num_outputs": model.num_outputs, "head": model.head_name}
    with atomic_folder(path) as folder:
        if isinstance(model.trunk, BeliefStateTrunk):
            about["belief_state"] = asdict(model.trunk.model.config)
        else:
            model.trunk.model.config.save_pretrained(folder)
        save_model(model, str(folder / WEIGHTS_FILE))  # handles tied weights
        write_state(folder, {"extra": extra})
        optimizer_state.write_optimizer(
            dict(model.named_parameters()), optimizer, folder / STATE_FOLDER / OPTIMIZER_FILE
        )
        (folder / CLASSIFIER_FILE).write_text(json.dumps(about, indent=2))


def load_classifier(path: str | Path, device: torch.device) -> Classifier:
    """CheckpointError if the folder holds no classifier."""
    path = Path(path)
    try:
        about = json.loads((path / CLASSIFIER_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a classifier of this project ({CLASSIFIER_FILE}: {error})") from error
    if "belief_state" in about:
        trunk = BeliefStateTrunk(BeliefState(BeliefStateConfig(**about["belief_state"]), seed=None))
    else:
        trunk = LanguageModelTrunk(
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32).eval()
        )
    model = Classifier(trunk, about["num_outputs"], about["head"]).to(device)
    load_weights(path, model)
    return model


def load_weights(path: Path, model: Classifier) -> None:
    try:
        load_model(model, str(path / WEIGHTS_FILE))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not hold the weights of this classifier (other trunk, head or num_outputs?): {error}"
        ) from error


def load_optimizer(path: Path, model: Classifier, optimizer: torch.optim.Optimizer) -> None:
    """Parts of a trunk that the classifier does not use have no gradient and no state."""
    parameters, file = dict(model.named_parameters()), state_file(path, OPTIMIZER_FILE)
    names = {key.split(":", 1)[1] for key in tensor_shapes(file)}
    optimizer_state.load_optimizer({name: parameters[name] for name in names}, optimizer, file)
