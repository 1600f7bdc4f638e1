"""The rows of `make evidence` that are ratios of times or memory, taken on a quiet machine; the simulated
cluster; and the 0.5B shape, whose figures are the same beside other work.
"""

from benchmarks.evidence_code import RL
from benchmarks.evidence_row import Printed, Result, Row

RACE = [f"benchmarks/{name}.py" for name in ("race", "clocked", "trl_side")]
RUNS = {"sft": "supervised", "rl": "RL"}  # of half_b_gsm8k.py
SEVERAL = ("posttrain/backend", "posttrain/tracking")


def cluster_simulation() -> Row:
    """Of models where they fit: the GPU time of the arithmetic over that of a step; and the router's choices."""
    labels = [
        f"{model} {kind}, `{how}` | {gpus} GPUs"
        for model, smallest in (("7B", 8), ("32B", 32), ("70B", 32))
        for kind in ("synchronous", "asynchronous")
        for how in ("files", "nccl")
        for gpus in (8, 32, 128, 512)
        if gpus >= smallest
    ]
    labels += [
        f"{router} | {what}"
        for router in ("round robin", "SLACK 1", "SLACK 1.5", "SLACK 4", "SLACK inf", "plain hashing")
        for what in ("cached share of the prompts", "seconds of a group", "of all")
    ]
    return Row(
        "cluster_simulation",
        "benchmarks/cluster_simulation.py --report {folder}/simulation.json",
        ("benchmarks/cluster_simulation.py", "posttrain/backend/routing.py", "posttrain/backend/batching.py"),
        {label: Result(label, "simulation.json", part="figures") for label in labels},
        seeds=(0,),
    )


def benchmark(name: str, command: str, *code: str) -> Row:
    return Row(name, command, (*RL, *code, command.split()[0]), results=name, seeds=(0,))


def half_b(name: str, label: str, options: str) -> Row:
    printed = {
        f"{column}, {what}": f"{run}: {what}" for run, column in RUNS.items() for what in ("peak, GiB", "planned, GiB")
    }
    printed["RL, largest difference of a logprob"] = "rl: largest |dlogp|"
    return Row(
        name,
        f"-m benchmarks.half_b_gsm8k data_dir={{data}}/gsm8k {options}".strip(),
        (*RL, "benchmarks/half_b_gsm8k.py"),
        {f"{label} | {column}": Printed(words) for column, words in printed.items()},
        seeds=(0,),
    )


TIMES = [
    benchmark("train_throughput", "benchmarks/train_throughput.py"),
    benchmark("memory_vs_hf_loss", "benchmarks/memory_vs_hf_loss.py"),
    benchmark("async_vs_sync", "benchmarks/async_vs_sync.py"),
    *(
        benchmark(f"rollouts_vs_vllm-{task}", f"benchmarks/rollouts_vs_vllm.py --task {task}")
        for task in ("arithmetic", "fixed", "short")
    ),
    *(
        benchmark(
            f"latro_step_vs_plain-{shape}", f"benchmarks/latro_step_vs_plain.py --shapes {shape}", "recipes/latro"
        )
        for shape in ("small", "tiny", "tiny-long")
    ),
    benchmark("bstar_sweep-torch", "benchmarks/bstar_sweep.py --engine torch", "recipes/bstar"),
    benchmark("belief_state_step", "benchmarks/belief_state_step.py", "recipes/libraries"),
    benchmark("star_graph_generation", "benchmarks/star_graph_generation.py", "envs"),
    benchmark("rl_step_vs_trl", "benchmarks/rl_step_vs_trl.py", *RACE),
    benchmark("sft_step_vs_trl", "benchmarks/sft_step_vs_trl.py", *RACE),
    benchmark("dpo_step_vs_trl", "benchmarks/dpo_step_vs_trl.py", *RACE, "preference"),
    benchmark("threads", "benchmarks/threads.py", "benchmarks/train_throughput.py"),
    benchmark("unmerged_adapters", "benchmarks/unmerged_adapters.py"),
    benchmark("serve", "benchmarks/serve.py", "benchmarks/serve_side.py", "posttrain/serve"),
    Row(
        "cluster",
        "benchmarks/cluster.py",
        (*SEVERAL, "benchmarks/cluster.py"),  # not RL, which leaves out the files for several processes
        results="cluster",
        seeds=(0,),
        has_daemons=True,
    ),
    cluster_simulation(),
    half_b("half_b", "all weights, torch", ""),
    half_b("half_b_lora", "LoRA, rank 16, vLLM", "lora_rank=16 engine=vllm"),
]
