"""The rows of `make evidence`: what is run, and which numbers of it the pages show."""

from benchmarks.evidence_row import Metric, Row
from recipes.algorithms.variants import VARIANTS, folder_name

# Files for several processes: every row runs in one.
CLUSTER = ("cluster", "sampler_actor", "sampler_pool", "sharded_trainer", "trainer_group", "trainer_rank")
BACKEND = (
    "posttrain/backend",
    *(f":(exclude)posttrain/backend/{name}.py" for name in CLUSTER),
    "posttrain/renderers",
    "posttrain/tracking",
)
SUPERVISED = (*BACKEND, "supervised")
RL = (*SUPERVISED, "rl", "envs", "recipes/warm_start.py")
PREFERENCE = (*SUPERVISED, "preference", "recipes/warm_start.py")

CORRECT, GAP = "test/env/all/correct", "optim/logprob_gap_mean"
PRESETS = ["importance_sampling", "reinforce", "rloo", "grpo", "dr_grpo", "dapo", "cispo", "ppo"]
STAR_GRAPH = ["gpt", "teacherless", "bst", "reinforce", "rl", "dpo", "rpo", "cd", "qsharp"]


def beside_grpo(variants: str) -> Row:
    folders = {name: f"run/{{seed}}/{folder_name(name)}" for name in VARIANTS[variants]}
    return Row(
        f"beside_grpo_{variants}",
        f"recipes/algorithms/beside_grpo.py variants={variants} seeds={{seed}} log_path={{folder}}/run",
        (*RL, "recipes/algorithms"),
        {f"{name}: held-out accuracy": Metric(CORRECT, folder=folder) for name, folder in folders.items()},
    )


def benchmark(name: str, command: str, *code: str) -> Row:
    return Row(name, command, (*RL, *code, command.split()[0]), results=name, seeds=(0,))


ROWS = [
    Row(
        "demo",
        "recipes/demo.py seed={seed} log_path={folder}/run",
        (*RL, "recipes/demo.py"),
        {
            "`make demo`: held-out accuracy after the warm start": Metric(CORRECT, "first", "run"),
            "`make demo`: held-out accuracy after RL": Metric(CORRECT, "last", "run"),
            "`make demo`: largest mean gap of a step, sampler against trainer": Metric(GAP, "max", "run"),
        },
    ),
    Row(
        "algorithms",
        "recipes/algorithms/train.py seed={seed} log_path={folder}/run",
        (*RL, "recipes/algorithms"),
        {f"`{name}`: held-out accuracy": Metric(CORRECT, folder=f"run/{name}") for name in PRESETS},
        picture="run/compare.png recipes/algorithms/compare.png",
    ),
    beside_grpo("algorithms"),
    beside_grpo("precision"),
    beside_grpo("off_policy"),
    beside_grpo("faults"),
    Row(
        "distillation",
        "recipes/distillation/on_policy.py seeds={seed} log_path={folder}/run",
        (*RL, "recipes/distillation"),
        {
            f"{name}: held-out accuracy": Metric(CORRECT, folder=f"run/on_policy_{{seed}}/{name}")
            for name in ("distill", "grpo")
        },
    ),
    Row(
        "off_policy_distillation",
        "recipes/distillation/off_policy.py seed={seed} log_path={folder}/run",
        (*RL, "recipes/distillation"),
        {
            f"{name}: nats per token of unseen answers": Metric("test/nll", folder=f"run/off_policy_{{seed}}/{name}")
            for name in ("hard", "soft", "renormalised")
        },
    ),
    Row(
        "guess_number",
        "recipes/guess_number/train.py seed={seed} log_path={folder}/run behavior_if_log_dir_exists=resume",
        (*RL, "recipes/guess_number"),
        {
            "guess_number: games won after the warm start": Metric("test/env/all/solved", "first", "run"),
            "guess_number: games won after RL": Metric("test/env/all/solved", "last", "run"),
        },
    ),
    Row(
        "tool_calls",
        "recipes/tool_calls/train.py seed={seed} log_path={folder}/run",
        (*RL, "recipes/tool_calls"),
        {
            f"tool_calls, {label}: right after RL": Metric(CORRECT, folder=f"run/{label}/rl")
            for label in ("with_calculator", "from_memory")
        },
        picture="run/tool_calls.png recipes/tool_calls/tool_calls.png",
    ),
    Row(
        "retrieval",
        "recipes/tool_calls/retrieval.py seed={seed} log_path={folder}/run",
        (*RL, "recipes/tool_calls"),
        {
            f"retrieval, {label}: right after RL": Metric(CORRECT, folder=f"run/{label}/rl")
            for label in ("with_search", "from_memory")
        },
    ),
    Row(
        "dpo",
        "recipes/dpo/train.py seed={seed} log_path={folder}/run",
        (*PREFERENCE, "recipes/dpo"),
        {
            f"{name}: {key.removeprefix('test/')}, held out": Metric(key, folder=f"run/{name}")
            for name in ("dpo", "rpo")
            for key in ("test/accuracy", "test/chosen_logprob", "test/rejected_logprob")
        },
    ),
    Row(
        "prm",
        "recipes/prm/train.py seed={seed} log_path={folder}/run",
        (*PREFERENCE, *RL, "recipes/prm"),
        {
            "prm: chains whose first wrong step is found": Metric("test/first_error", folder="run/prm"),
            "prm: steps classified right": Metric("test/accuracy", folder="run/prm"),
        },
    ),
    Row(
        "latro",
        "recipes/latro/experiment.py seeds={seed} log_path={folder}/run",
        (*RL, "recipes/latro"),
        {"LaTRO: held-out accuracy": Metric(CORRECT, folder="run/seed{seed}/latro")},
    ),
    Row(
        "star_graph",
        "recipes/star_graph/train.py seeds=[{seed}] log_path={folder}/run",
        (*RL, "preference", "recipes/libraries", "recipes/star_graph", "recipes/belief_state"),
        {
            f"`{name}`: first hop": Metric(
                "test/env/all/first_hop" if name in ("reinforce", "rl") else "test/first_hop",
                folder=f"run/seed_{{seed}}/{name}",
            )
            for name in STAR_GRAPH
        },
        picture="run/star_graph.png recipes/star_graph/star_graph.png",
    ),
    benchmark("train_throughput", "benchmarks/train_throughput.py"),
    benchmark("memory_vs_hf_loss", "benchmarks/memory_vs_hf_loss.py"),
    benchmark("async_vs_sync", "benchmarks/async_vs_sync.py"),
    benchmark("rollouts_vs_vllm-arithmetic", "benchmarks/rollouts_vs_vllm.py --task arithmetic"),
    benchmark("rollouts_vs_vllm-fixed", "benchmarks/rollouts_vs_vllm.py --task fixed"),
    benchmark("latro_step_vs_plain-small", "benchmarks/latro_step_vs_plain.py --size small", "recipes/latro"),
    benchmark("bstar_sweep-torch", "benchmarks/bstar_sweep.py --engine torch", "recipes/bstar"),
    benchmark("belief_state_step", "benchmarks/belief_state_step.py", "recipes/libraries"),
    benchmark("star_graph_generation", "benchmarks/star_graph_generation.py", "envs"),
    benchmark("rl_step_vs_trl", "benchmarks/rl_step_vs_trl.py"),
    benchmark("sft_step_vs_trl", "benchmarks/sft_step_vs_trl.py"),
    benchmark("dpo_step_vs_trl", "benchmarks/dpo_step_vs_trl.py", "preference"),
]
