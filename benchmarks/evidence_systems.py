"""The rows of `make evidence` of the four published systems: B-STaR, LaTRO, star graphs, the Belief State Transformer."""

from collections.abc import Mapping, Sequence

from benchmarks.evidence_code import PREFERENCE, RL
from benchmarks.evidence_row import FIRST_AND_LAST, Metric, Reached, Result, Row
from recipes.belief_state.search import SETTINGS
from recipes.latro.rare import LINES as RARE
from recipes.latro.variants import ABLATIONS, NORM, START, Lines, last
from recipes.star_graph.trunks import TRUNKS

LATRO = ("log p(y given x, z)", "useful", "greedy")
FIRST_HOP = "test/first_hop"
STAR_GRAPH = {
    "gpt": "`gpt`, 0.10M weights",
    "reversed": "`reversed`, 0.10M weights",
    "teacherless": "`teacherless`, 0.10M weights",
    "bst": "`bst`, 0.74M weights",
    **{name: f"`{name}`, from `gpt`" for name in ("reinforce", "rl", "dpo", "rpo")},
    **{name: f"`{name}`, on the trained `bst`'s features" for name in ("cd", "qsharp")},
}
GUIDANCE = {
    **{method: f"{method}, greedy" for method in ("Q#, 0.1", "CD, 0.1", "cd_code", "Q#, 1", "CD, 1")},
    **{f"{method}: KL": f"{method}, KL" for method in ("Q#, 0.1", "CD, 0.1")},
}
BELIEF_STATE = (*RL, "recipes/libraries/belief_state", "recipes/belief_state", "recipes/results.py")
BSTAR = {
    "bstar": "B-STaR",
    "temperature_only": "temperature alone is chosen",
    "threshold_only": "threshold alone is chosen",
    "online_rft_t05": "fixed T 0.5, threshold 0.5",
    "online_rft_t07": "fixed T 0.7, threshold 0.5",
    "online_rft_t10": "fixed T 1, threshold 0.5",
    "online_rft": "fixed T 1, threshold 0 (the paper's)",
}
BSTAR_CONTROLS = {
    "bstar": "B-STaR",
    "bstar_n3": "n* = 3",
    "bstar_n6": "n* = 6",
    "bstar_n24": "n* = 24",
    "bstar_oracle": "B-STaR, exact reward",
    "rest_em": "ReST-EM, 20 steps a round",
    "rest_em_long": "ReST-EM, 120 steps a round",
}


def latro(name: str, command: str, lines: Lines, columns: Sequence[str], also: Sequence[str] = ()) -> Row:
    """A comparison of recipes/latro; `also` the last checkpoints of these lines."""
    supervised = [line for line, options in lines.items() if options.get("method") == "sft"]
    cells = [(line, column) for line in (START, *lines, *map(last, also)) for column in columns]
    cells += [(line, NORM) for line in lines if line not in supervised and lines is ABLATIONS]
    own = () if lines is RARE else (":(exclude)recipes/latro/rare.py",)
    return Row(
        name,
        f"recipes/latro/{command} seeds={{seed}} log_path={{folder}}/run",
        (*RL, "recipes/latro", "recipes/results.py", *own),
        {f"{line} | {column}": Result(f"{line} | {column}") for line, column in cells},
        picture="run/curves.png recipes/latro/latro.png" if lines is ABLATIONS else "",
    )


def latro_real(label: str, dataset: str, options: str = "") -> Row:
    """A few updates of a model that cannot solve the task."""
    columns = {"log p(y given x, z)": "likelihood/answer_logprob", "rationales that stop": "env/all/finished"}
    summary = "run/latro/summary.json"
    return Row(
        f"latro_{dataset}",
        f"recipes/latro/train.py dataset={dataset} dataset.data_dir={{data}}/{dataset} "
        f"dataset.num_validation=16 dataset.num_test=32 {options} rloo_k=4 train_batch_size=32 response_length=100 "
        f"max_updates=30 num_evaluations=2 learning_rate=1e-3 seed={{seed}} log_path={{folder}}/run",
        (*RL, "recipes/latro", ":(exclude)recipes/latro/rare.py"),
        {
            f"{label} | {column}, {part}": Result(key, summary, part)
            for column, key in columns.items()
            for part in ("before", "after")
        },
        asks=True,
    )


def belief_state(name: str, label: str, options: str) -> Row:
    return Row(
        name,
        f"recipes/belief_state/train.py seed={{seed}} {options} behavior_if_log_dir_exists=resume log_path={{folder}}/run",
        BELIEF_STATE,
        {
            f"{label}: first hop": Metric(FIRST_HOP, folder="run"),
            f"{label}: whole path": Metric("test/exact", folder="run"),
            f"{label}: 95% of the paths from step": Reached("test/exact", folder="run", level=0.95),
        },
    )


def search(model: str, options: str) -> Row:
    """Nine settings on seed 3, then the best on seeds 0, 1, 2; the GPT with three times the steps, too."""
    all_steps = (600, 1800) if model == "gpt" else (600,)
    labels = [f"best, {steps} steps, seed {seed}" for steps in all_steps for seed in (0, 1, 2)]
    return Row(
        f"{model}_search",
        f"recipes/belief_state/search.py model={model} {options} log_path={{folder}}/run",
        BELIEF_STATE,
        {
            f"{model.upper()}: {label}": Result(label, f"run/{model}/results.json")
            for label in (*SETTINGS[model], *labels)
        },
        seeds=(3,),
    )


def bstar(name: str, methods: Mapping[str, str], seeds: tuple[int, ...], more: Mapping[str, str]) -> Row:
    """Each method's test accuracy after the last round, and what B-STaR has more at the same seed."""
    others = {method: label for method, label in methods.items() if method != "bstar"}
    return Row(
        name,
        f"recipes/bstar/train.py methods={','.join(methods)} seed={{seed}} log_path={{folder}}/run",
        (*PREFERENCE, "envs", "rl/sample_metrics.py", "recipes/libraries", "recipes/results.py", "recipes/bstar"),
        {
            **{label: Result(key) for label, key in more.items()},
            **{
                f"{label}: {metric}": Result(f"{method}: {metric}")
                for metric in ("pass@1", "greedy", "pass@16-8")
                for method, label in {"warm start": "warm start", **methods}.items()
            },
            **{
                f"B-STaR less {label}: {metric}": Result(f"bstar - {method}: {metric}")
                for metric in ("pass@1", "greedy")
                for method, label in others.items()
            },
        },
        seeds=seeds,
    )


SYSTEMS = [
    bstar(
        "bstar",
        BSTAR,
        tuple(range(30, 40)),
        {
            "AUC of the step scores, valid derivations over others": "reward: AUC, valid derivations over others",
            "the same, right answers over wrong ones": "reward: AUC, right answers over wrong ones",
            "warm start: valid derivations": "warm start: valid derivations",
            "B-STaR's temperature in round 1": "bstar: temperature, round 1",
            "B-STaR's temperature in the last round": "bstar: temperature",
            "right in B-STaR's last training set": "bstar: training set right",
            "right in that of the paper's fixed settings": "online_rft: training set right",
        },
    ),
    bstar("bstar_more", BSTAR_CONTROLS, (30, 31, 32), {}),
    latro("latro", "experiment.py", ABLATIONS, (*LATRO, "maj@8"), also=["SFT on answers"]),
    latro("latro_rare", "rare.py", RARE, (*LATRO, "sampled")),
    latro("latro_rare_exact", "rare.py noise=0", RARE, (*LATRO, "sampled")),
    latro_real("GSM8K", "gsm8k", "warm_start_updates=10"),
    latro_real("ARC-Challenge", "arc_challenge"),
    Row(
        "star_graph",
        "recipes/star_graph/train.py seeds=[{seed}] processes=1 log_path={folder}/run",
        (*BELIEF_STATE, "preference", "recipes/star_graph"),
        {
            **{
                label: Metric(
                    "test/env/all/first_hop" if name == "rl" else FIRST_HOP, folder=f"run/seed_{{seed}}/{name}"
                )
                for name, label in STAR_GRAPH.items()
            },
            "`gpt`: nats per token of held-out paths": Metric("test/nll", folder="run/seed_{seed}/gpt"),
            **{
                f"`{name}`: logprob of the right path, {take} 10 steps": Metric(
                    "chosen_logprob", take, f"run/seed_{{seed}}/{name}", over=10
                )
                for name in ("dpo", "rpo")
                for take in FIRST_AND_LAST
            },
            **{
                f"`rl`: entropy, nats per token, {take} 10 steps": Metric(
                    "optim/entropy", take, "run/seed_{seed}/rl", over=10
                )
                for take in FIRST_AND_LAST
            },
        },
        picture="run/star_graph.png recipes/star_graph/star_graph.png",
    ),
    Row(
        "guidance",
        "recipes/star_graph/trunks.py seed={seed} log_path={folder}/run",
        (*BELIEF_STATE, "recipes/star_graph"),
        {
            **{
                f"the policy alone | {how}": Result(f"the policy alone | alone, {how}") for how in ("greedy", "sampled")
            },
            **{
                f"{line} | {column}": Result(f"{line} | {key}")
                for line in (*(f"bst's encoder, {name}" for name in TRUNKS), "oracle")
                for column, key in GUIDANCE.items()
            },
        },
    ),
    belief_state("belief_state", "BST, 0.74M weights", ""),
    belief_state("belief_state_gpt", "GPT, 0.74M weights, loss on all tokens", "model=gpt num_layers=6 hidden=104"),
    search("gpt", "data.loss_on=path"),
    search("bst", "times=[1]"),
    Row(
        "star_graph_long_bst",
        "recipes/belief_state/curriculum.py run.seed={seed} log_path={folder}/run",
        BELIEF_STATE,
        {f"BST, l = {length}: first hop": Metric(FIRST_HOP, folder=f"run/l{length}") for length in (3, 4, 5)},
    ),
]
