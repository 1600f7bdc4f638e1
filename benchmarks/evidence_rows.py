"""The rows of `make evidence`: what is run, and which numbers of it the pages show."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from benchmarks.evidence_code import PREFERENCE, RL
from benchmarks.evidence_row import Metric, Printed, Reached, Result, Row, Take
from benchmarks.evidence_times import TIMES
from recipes.algorithms.variants import DRAWN, VARIANTS
from recipes.belief_state.search import SETTINGS
from recipes.labels import folder_name
from recipes.latro.rare import LINES as RARE
from recipes.latro.variants import ABLATIONS, NORM, START, Lines, last

DISTILLATION = (*RL, "recipes/distillation", "recipes/results.py")

ACCURACY = "held-out accuracy"
CORRECT, GAP = "test/env/all/correct", "optim/logprob_gap_mean"
REWARD, GOLD, SOLVED = "env/all/reward/total", "test/env/all/gold", "test/env/all/solved"
SAMPLED = ("env/all/total_ac_tokens", "train/refill_tokens")
BEFORE_AND_AFTER: list[tuple[str, Take]] = [("the warm start", "first"), ("RL", "last")]
PREFERENCES: list[tuple[str, str, Take]] = [
    ("warm start", "dpo", "first"),
    ("DPO", "dpo", "last"),
    ("RPO", "rpo", "last"),
]
RLHF: list[tuple[str, str, Take]] = [
    ("SFT (first step)", "rl", "first"),
    ("RL, KL penalty 0.5", "rl", "last"),
    ("RL, no penalty", "rl_no_penalty", "last"),
]
STUDENTS = ["hard", "soft", "renormalised"]
LATRO = ("log p(y given x, z)", "useful", "greedy")
PRESETS = ["importance_sampling", "reinforce", "rloo", "grpo", "dapo", "cispo", "ppo"]
MULTI_TURN = [*PRESETS, "ppo_critic", "reinforce_pp", "reinforce_pp_baseline"]
FIRST_HOP = "test/first_hop"
FIRST_AND_LAST: list[tuple[str, Take]] = [("first", "first"), ("last", "last")]
STAR_GRAPH = {
    "gpt": "`gpt`, 0.10M weights",
    "reversed": "`reversed`, 0.10M weights",
    "teacherless": "`teacherless`, 0.10M weights",
    "bst": "`bst`, 0.74M weights",
    **{name: f"`{name}`, from `gpt`" for name in ("reinforce", "rl", "dpo", "rpo")},
    **{name: f"`{name}`, on the trained `bst`'s features" for name in ("cd", "qsharp")},
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


LATE = {"rollouts right, last 10 steps": Metric(REWARD, over=10)}
TOKENS = {"sampled tokens to 0.7": Reached(CORRECT, level=0.7, total=SAMPLED)}


def beside_grpo(variants: str, columns: dict[str, Metric]) -> Row:
    """`columns`: the metrics of each variant, beside its held-out accuracy."""
    folders = {name: f"run/{{seed}}/{folder_name(name)}" for name in VARIANTS[variants]}
    start = f"run/{{seed}}/{folder_name(next(iter(folders)))}"
    return Row(
        f"beside_grpo_{variants}",
        f"recipes/algorithms/beside_grpo.py variants={variants} seeds={{seed}} log_path={{folder}}/run",
        (*RL, "recipes/algorithms"),
        {
            f"warm start | {ACCURACY}": Metric(CORRECT, "first", start),
            **{
                f"{name} | {column}": replace(metric, folder=folder)
                for name, folder in folders.items()
                for column, metric in ({ACCURACY: Metric(CORRECT)} | columns).items()
            },
        },
    )


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


def lesson(name: str, metrics: dict[str, Metric | Printed], folder: str = "") -> Row:
    metrics = {f"`{name}` | {label}": metric for label, metric in metrics.items()}
    return Row(name, f"recipes/{name}.py seed={{seed}} {folder}".strip(), (*RL, f"recipes/{name}.py"), metrics)


def tool_calls(name: str, script: str, tool: str) -> Row:
    return Row(
        name,
        f"recipes/tool_calls/{script} seed={{seed}} log_path={{folder}}/run",
        (*RL, "recipes/tool_calls"),
        {
            f"{label.replace('_', ' ')}, after {when} | {what}": Metric(f"test/env/all/{key}", take, f"run/{label}/rl")
            for label in (tool, "from_memory")
            for what, key in (("right", "correct"), ("calls", "calls"))
            for when, take in BEFORE_AND_AFTER
            if label == tool or key == "correct"
        },
        picture=f"run/tool_calls.png recipes/tool_calls/{name}.png",
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


def curriculum(name: str, label: str, options: str) -> Row:
    """Arms of 3, 4 and 5 nodes, each from the weights of the one before."""
    return Row(
        name,
        f"recipes/belief_state/curriculum.py run.seed={{seed}} {options} log_path={{folder}}/run",
        BELIEF_STATE,
        {f"{label}, l = {length}: first hop": Metric(FIRST_HOP, folder=f"run/l{length}") for length in (3, 4, 5)},
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
    lesson(
        "sl_loop",
        {
            "nats per token, before": Printed("held-out loss", first=True),
            "after": Printed("held-out loss"),
            f"{ACCURACY}, after": Printed("held-out accuracy"),
        },
    ),
    lesson(
        "sl_basic",
        {
            "nats per token, before": Metric("test/nll", "first", "run"),
            "after": Metric("test/nll", "last", "run"),
        },
        "log_path={folder}/run",
    ),
    lesson(
        "rl_loop",
        {
            f"{ACCURACY}, before RL": Printed("held-out accuracy", first=True),
            "after RL": Printed("held-out accuracy"),
            "gap of the last step": Printed("gap"),
        },
    ),
    lesson(
        "rl_basic",
        {
            f"{ACCURACY}, before RL": Metric(CORRECT, "first", "run"),
            "after RL": Metric(CORRECT, "last", "run"),
            "gap of the last step": Metric(GAP, "last", "run"),
        },
        "log_path={folder}/run",
    ),
    Row(
        "algorithms",
        f"recipes/algorithms/train.py algorithms={','.join(PRESETS)} num_steps=300 seed={{seed}} log_path={{folder}}/run",
        (*RL, "recipes/algorithms"),
        {
            f"warm start | sums: {ACCURACY}": Metric(CORRECT, "first", "run/grpo"),
            **{f"`{name}` | sums: {ACCURACY}": Metric(CORRECT, folder=f"run/{name}") for name in PRESETS},
            **{f"`{name}` | sums: steps to 0.9": Reached(CORRECT, folder=f"run/{name}", level=0.9) for name in PRESETS},
        },
        picture="run/compare.png recipes/algorithms/compare.png",
    ),
    Row(
        "algorithms_multi_turn",
        "recipes/algorithms/multi_turn.py seed={seed} log_path={folder}/run",
        (*RL, "recipes/algorithms"),
        {
            "warm start | game: won": Metric(SOLVED, "first", "run/grpo"),
            **{f"`{name}` | game: won": Metric(SOLVED, folder=f"run/{name}") for name in MULTI_TURN},
            **{
                f"`{name}` | game: reward, last 10 steps": Metric(REWARD, folder=f"run/{name}", over=10)
                for name in MULTI_TURN
            },
        },
    ),
    beside_grpo("algorithms", LATE | TOKENS),
    beside_grpo("precision", LATE | {"largest mean gap of a step": Metric(GAP, "max")}),
    beside_grpo("off_policy", LATE | TOKENS | {"largest mean gap of a step": Metric(GAP, "max")}),
    # means over steps 5 to 15, where there is time to stop a run
    beside_grpo(
        "faults", {f"`{key.split('/')[-1]}`": Metric(key, "first", over=11, skip=5) for key in DRAWN["faults"]}
    ),
    Row(
        "distillation",
        "recipes/distillation/on_policy.py seeds={seed} log_path={folder}/run",
        DISTILLATION,
        {
            f"teacher | {ACCURACY}": Result("teacher"),
            f"warm start | {ACCURACY}": Metric(CORRECT, "first", "run/on_policy_{seed}/grpo"),
            **{
                f"{label} | {what}": Reached(
                    CORRECT, folder=f"run/on_policy_{{seed}}/{name}", level=level, total=SAMPLED
                )
                if level
                else Metric(CORRECT, folder=f"run/on_policy_{{seed}}/{name}")
                for what, level in ((ACCURACY, 0.0), ("sampled tokens to 0.85", 0.85), ("to 0.945", 0.945))
                for label, name in (("distillation", "distill"), ("GRPO", "grpo"))
            },
        },
    ),
    Row(
        "off_policy_distillation",
        "recipes/distillation/off_policy.py seed={seed} log_path={folder}/run",
        DISTILLATION,
        {
            **{f"{name} | {ACCURACY}": Result(name, "run/off_policy_{seed}/results.json") for name in STUDENTS},
            **{
                f"{name} | nats per token of unseen answers": Metric(
                    "test/nll", folder=f"run/off_policy_{{seed}}/{name}"
                )
                for name in STUDENTS
            },
        },
    ),
    Row(
        "prompt_distillation",
        "recipes/distillation/prompt.py seed={seed} log_path={folder}/run",
        DISTILLATION,
        {
            label: Result(key, "run/prompt_{seed}/results.json")
            for label, key in (
                ("with the words", "prompted"),
                ("without, before", "before"),
                ("without, after", "after"),
            )
        },
    ),
    Row(
        "self_distillation",
        "recipes/distillation/self_distillation.py seed={seed} log_path={folder}/run",
        DISTILLATION,
        {
            "before": Metric(CORRECT, "first", "run/self_{seed}/frozen"),
            "after": Metric(CORRECT, "last", "run/self_{seed}/frozen"),
        },
    ),
    Row(
        "guess_number",
        "recipes/guess_number/train.py seed={seed} log_path={folder}/run behavior_if_log_dir_exists=resume",
        (*RL, "recipes/guess_number"),
        {
            f"after {when} | {label}": Metric(f"test/env/all/{key}", take, "run")
            for label, key in (
                ("games won", "solved"),
                ("turns", "turns"),
                ("guesses that the answers allow", "consistent"),
            )
            for when, take in BEFORE_AND_AFTER
        },
    ),
    tool_calls("tool_calls", "train.py", "with_calculator"),
    tool_calls("retrieval", "retrieval.py", "with_search"),
    Row(
        "agent",
        "recipes/agent/train.py seeds={seed} log_path={folder}/run behavior_if_log_dir_exists=resume",
        (*RL, "recipes/agent"),
        {
            "answers right, mean of the first 5 steps": Metric(REWARD, "first", "run/seed_{seed}/rl", over=5),
            "answers right, mean of the last 5 steps": Metric(REWARD, "last", "run/seed_{seed}/rl", over=5),
            "held-out items, greedy, before RL": Metric(f"test/{REWARD}", "first", "run/seed_{seed}/rl"),
            "held-out items, greedy, after RL": Metric(f"test/{REWARD}", "last", "run/seed_{seed}/rl"),
        },
    ),
    Row(
        "multiplayer",
        "recipes/multiplayer/train.py seed={seed} log_path={folder}/run behavior_if_log_dir_exists=resume",
        (*RL, "recipes/multiplayer"),
        {
            "games lost against random play, after the warm start": Metric("test/env/all/loss", "first", "run"),
            "games lost against random play, after self-play": Metric("test/env/all/loss", "last", "run"),
            "the same, first seat": Metric("test/env/seat0/loss", "last", "run"),
            "the same, second seat": Metric("test/env/seat1/loss", "last", "run"),
            "illegal moves in training, first 5 steps": Metric("env/all/illegal", "first", "run", over=5),
            "illegal moves in training, last 5 steps": Metric("env/all/illegal", "last", "run", over=5),
        },
    ),
    Row(
        "dpo",
        "recipes/dpo/train.py seed={seed} log_path={folder}/run",
        (*PREFERENCE, "recipes/dpo"),
        {
            **{
                f"{name} | {label}": Metric(f"test/{key}", take, f"run/{folder}")
                for name, folder, take in PREFERENCES
                for label, key in (
                    ("pairs ranked right", "accuracy"),
                    ("logprob of the better answer", "chosen_logprob"),
                    ("logprob of the worse answer", "rejected_logprob"),
                )
                if not (name == "warm start" and key == "accuracy")
            },
            **{
                f"{name} | sampled: {kind}": Result(f"{stage}: {kind}")
                for kind in ("in order", "the letters in another order", "anything else")
                for name, stage in (("warm start", "warm_start"), ("DPO", "dpo"), ("RPO", "rpo"))
            },
        },
        picture="run/dpo.png recipes/dpo/dpo.png",
    ),
    Row(
        "reward_model",
        "recipes/reward_model/train.py seed={seed} log_path={folder}/run behavior_if_log_dir_exists=resume",
        (*PREFERENCE, "recipes/reward_model"),
        {
            **{
                f"{name} | {what}": Result(f"{kind}/{key}")
                for what, key in (
                    ("accuracy", "accuracy"),
                    ("expected calibration error", "ece"),
                    ("both orders agree", "swap_agreement"),
                    ("leaning on ties", "tie_leaning"),
                )
                for name, kind in (("scalar", "scalar"), ("label token", "label"))
            },
            "always the longer | accuracy": Result("scalar/always_longer"),
        },
        picture="run/reliability.png recipes/reward_model/reliability.png",
    ),
    Row(
        "rlhf",
        "recipes/rlhf/train.py seed={seed} log_path={folder}/run",
        (*PREFERENCE, *RL, "recipes/rlhf"),
        {
            "reward model: held-out pairs ranked right": Metric("test/accuracy", folder="run/reward_model"),
            **{
                f"{line} | {column}": Metric(key, take, f"run/{run}", over=steps if take == "last" else 1)
                for column, key, steps in (
                    ("true reward, held-out notes", GOLD, 1),
                    ("true reward, last 10 steps", GOLD.removeprefix("test/"), 10),
                    ("proxy reward, last 10 steps", REWARD, 10),
                )
                for line, run, take in RLHF
            },
        },
        picture="run/curve.png recipes/rlhf/curve.png",
    ),
    Row(
        "shorter",
        "recipes/shorter/train.py seed={seed} log_path={folder}/run",
        (*PREFERENCE, *RL, "recipes/shorter"),
        {
            "tokens per answer, first step": Metric("env/all/ac_tokens_per_turn", "first", "run"),
            "tokens per answer, last step": Metric("env/all/ac_tokens_per_turn", "last", "run"),
            "win rate against the warm start": Result("win_rate"),
        },
    ),
    Row(
        "prm",
        "recipes/prm/train.py seed={seed} log_path={folder}/run",
        (*PREFERENCE, *RL, "recipes/prm", "recipes/libraries", "recipes/results.py"),
        {
            **{
                f"answered right: {label}": Result(key)
                for label, key in (
                    ("mean of the samples", "sampled"),
                    ("majority of 8", "majority"),
                    ("best of 8 by the PRM", "best_of_n"),
                    ("any of 8", "any"),
                )
            },
            "first wrong step found": Result("first wrong step found"),
            "the same, by always naming the commonest": Result("... by always guessing the commonest"),
            "right chains in which nothing is marked": Result("right chains left unmarked"),
            "right steps labelled 0": Result("labels: right steps labelled 0"),
            "wrong steps labelled 1": Result("labels: wrong steps labelled 1"),
        },
        picture="run/prm.png recipes/prm/prm.png",
    ),
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
                f"`{name}`: logprob of the right path, {when} 10 steps": Metric(
                    "chosen_logprob", take, f"run/seed_{{seed}}/{name}", over=10
                )
                for name in ("dpo", "rpo")
                for when, take in FIRST_AND_LAST
            },
            **{
                f"`rl`: entropy, nats per token, {when} 10 steps": Metric(
                    "optim/entropy", take, "run/seed_{seed}/rl", over=10
                )
                for when, take in FIRST_AND_LAST
            },
        },
        picture="run/star_graph.png recipes/star_graph/star_graph.png",
    ),
    belief_state("belief_state", "BST, 0.74M weights", ""),
    belief_state("belief_state_gpt", "GPT, 0.74M weights, loss on all tokens", "model=gpt num_layers=6 hidden=104"),
    search("gpt", "data.loss_on=path"),
    search("bst", "times=[1]"),
    curriculum("star_graph_long_bst", "BST", ""),
    curriculum("star_graph_long_gpt", "GPT", "run.model=gpt run.num_layers=6 run.hidden=104 data.loss_on=path"),
    *TIMES,
]
