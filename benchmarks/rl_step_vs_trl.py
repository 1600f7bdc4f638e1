"""One RL step of our loop against one of TRL 1.16's GRPOTrainer: 64 problems x 8 samples of the arithmetic task, the same warm-
started `tiny`.

    pip install --target /tmp/trl-site --no-deps trl==1.16.0      # beside the virtual environment, which stays as it is
    python benchmarks/rl_step_vs_trl.py [--rounds 2] [--steps 25]

Both sides sample up to 6 tokens at temperature 1 and take one AdamW step at 1e-4 in fp32, without KL, clipping of gradients or
division by the standard deviation. TRL samples with transformers' generate, as it does on a CPU. Ours does more per step: it
syncs weights into a second engine, probes the sync, writes metrics and, every tenth step, a transcript; that is all counted.
TRL_SITE names another folder.
"""

import argparse
import json
import os
import sys

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from benchmarks.clocked import GROUP_SIZE, GROUPS, LEARNING_RATE, MAX_TOKENS, run_rl, run_sft
from benchmarks.race import race

SETTINGS = {
    "model": "tiny",
    "problems": GROUPS,
    "samples each": GROUP_SIZE,
    "max_tokens": MAX_TOKENS,
    "learning rate": LEARNING_RATE,
}
OURS = {"ours, engine=vllm": ["vllm"], "ours, engine=torch": ["torch"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25, help="timed steps in each round")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument(
        "--side", choices=("vllm", "torch", "warm_start"), help="used by the script itself: run one side, print its times"
    )
    parser.add_argument("--model", default="tiny", help="used with --side")
    arguments = parser.parse_args()
    if arguments.side == "warm_start":
        print(json.dumps(run_sft("tiny", arguments.steps, 0, save_to=arguments.model, learning_rate=1e-3)))
    elif arguments.side:
        print(json.dumps(run_rl(arguments.model, arguments.side, arguments.steps, arguments.warmup)))
    else:
        race("rl_step_vs_trl", OURS, {"TRL": "grpo"}, arguments.rounds, arguments.steps, arguments.warmup, SETTINGS)


if __name__ == "__main__":
    main()
