"""One supervised step of our loop against one of TRL 1.16's SFTTrainer: 128 arithmetic examples, the same warm-started `tiny`,
the same tokens.

    pip install --target /tmp/trl-site --no-deps trl==1.16.0      # beside the virtual environment, which stays as it is
    python benchmarks/sft_step_vs_trl.py [--rounds 3] [--steps 60]

Both take one AdamW step at 1e-4 in fp32 with loss on the answers alone. TRL gets its examples tokenized beforehand; ours
renders them in the loop, as it always does, and writes its metrics. TRL_SITE names another folder.
"""

import argparse
import json
import os
import sys

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from benchmarks.clocked import LEARNING_RATE, SFT_BATCH, run_sft
from benchmarks.race import race

SETTINGS = {"model": "tiny", "batch": SFT_BATCH, "learning rate": LEARNING_RATE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="timed steps in each round")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--side", choices=("ours", "warm_start"), help="used by the script itself: run one side, print its times")
    parser.add_argument("--model", default="tiny", help="used with --side")
    arguments = parser.parse_args()
    if arguments.side == "warm_start":
        print(json.dumps(run_sft("tiny", arguments.steps, 0, save_to=arguments.model, learning_rate=1e-3)))
    elif arguments.side:
        print(json.dumps(run_sft(arguments.model, arguments.steps, arguments.warmup)))
    else:
        race("sft_step_vs_trl", {"ours": ["ours"]}, {"TRL": "sft"}, arguments.rounds, arguments.steps, arguments.warmup, SETTINGS)


if __name__ == "__main__":
    main()
