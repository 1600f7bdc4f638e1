"""Accuracy and KL of a guided policy on held-out graphs: a table of methods with the trained
classifier, a perfect classifier (oracle.py) and no classifier.
"""

from collections.abc import Sequence

import chz
import numpy as np
import torch

from envs.star_graph_data import path_accuracy
from envs.star_graph_tokens import Layout
from recipes.libraries.value_guidance.guidance import Guidance, Method
from recipes.libraries.value_guidance.guided_sampler import Reader, ValueReader, guided_sample
from recipes.star_graph.oracle import oracle

DECODED_AT_ONCE = 512  # graphs; the classifier's cache has top_k rows for each
FIGURES = ("first_hop", "exact")
Row = dict[str, float | str]


def decode(
    policy: Reader,
    classifier: ValueReader | None,
    guidance: Guidance,
    ids_B_T: torch.Tensor,
    layout: Layout,
    seed: int | None = None,
) -> dict[str, float]:
    """path_accuracy of the guided policy on graphs in the tokenizer's ids, and "kl" from the
    unguided policy in nats per path. Greedy, or sampled with `seed`.
    """
    ids_B_L, kl_B = [], []
    uniforms_B_L = (
        None
        if seed is None
        else torch.from_numpy(np.random.default_rng(seed).random((len(ids_B_T), layout.target_length)))
    )
    for first in range(0, len(ids_B_T), DECODED_AT_ONCE):
        rows = slice(first, first + DECODED_AT_ONCE)
        uniforms = None if uniforms_B_L is None else uniforms_B_L[rows].to(ids_B_T.device)
        prompts_B_P = ids_B_T[rows, : layout.prefix_length]
        sample = guided_sample(policy, prompts_B_P, layout.target_length, guidance, classifier, uniforms)
        ids_B_L.append(sample.tokens_B_T)
        kl_B.append(sample.kl_B_T.sum(1))
    paths_B_L, gold_B_L = torch.cat(ids_B_L).cpu().numpy(), ids_B_T[:, layout.prefix_length :].cpu().numpy()
    accuracy = path_accuracy(paths_B_L[:, layout.nodes_L], gold_B_L[:, layout.nodes_L])
    return accuracy | {"kl": float(torch.cat(kl_B).mean())}


def guidance_table(
    policy: Reader,
    classifier: ValueReader,
    guidance: Guidance,
    kl_coefs: Sequence[float],
    ids_B_T: torch.Tensor,
    layout: Layout,
    seed: int,
) -> list[Row]:
    """The policy alone, then each method at each kl_coef with the classifier and with the oracle,
    greedy and sampled. "kl" is of sampling, with the same uniform numbers in all rows.
    """
    settings: list[tuple[Method, float]] = [(method, kl_coef) for method in ("q_sharp", "cd") for kl_coef in kl_coefs]
    settings.append(("cd_code", guidance.kl_coef))
    readers = {"none": None, "trained": classifier, "oracle": oracle(layout, policy.trunk.vocab_size)}
    rows: list[Row] = []
    for name, reader in readers.items():
        for method, kl_coef in settings if reader else settings[:1]:
            here = chz.replace(guidance, method=method, kl_coef=kl_coef)
            greedy = decode(policy, reader, here, ids_B_T, layout)
            sampled = decode(policy, reader, here, ids_B_T, layout, seed)
            row: Row = {"classifier": name, "method": method if reader else "policy", "kl_coef": kl_coef}
            for decoding, result in (("greedy", greedy), ("sampled", sampled)):
                row |= {f"{key}_{decoding}": result[key] for key in FIGURES}
            rows.append(row | {"kl": sampled["kl"]})
    return rows


def format_table(rows: Sequence[Row]) -> str:
    figures = [key for key in rows[0] if key not in ("classifier", "method", "kl_coef")]
    lines = [f"{'classifier':10s} {'method':8s} {'kl_coef':>7s} " + " ".join(f"{figure:>17s}" for figure in figures)]
    for row in rows:
        kl_coef = row["kl_coef"] if row["method"] in ("q_sharp", "cd") else "-"
        label = f"{row['classifier']:10s} {row['method']:8s} {kl_coef:>7}"
        lines.append(f"{label} " + " ".join(f"{row[figure]:17.3f}" for figure in figures))
    return "\n".join(lines)
