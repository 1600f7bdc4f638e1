"""One supervised step of our loop against one of TRL 1.16's SFTTrainer: 128 arithmetic examples,
the same warm-started `tiny`, the same tokens.

    pip install --target /tmp/trl-site --no-deps trl==1.16.0      # beside the virtual environment, which stays as it is
    python benchmarks/sft_step_vs_trl.py [--rounds 3] [--steps 60]

Both take one AdamW step at 1e-4 in fp32 with loss on the answers alone. TRL gets its examples
tokenized beforehand; ours renders them in the loop, as it always does, and writes its metrics.
TRL_SITE names another folder.
"""

import os
import sys

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from benchmarks.clocked import LEARNING_RATE, SFT_BATCH, run_sft
from benchmarks.race import race

SETTINGS = {"model": "tiny", "batch": SFT_BATCH, "learning rate": LEARNING_RATE}


if __name__ == "__main__":
    race(__doc__, "sft_step_vs_trl", {"ours": run_sft}, {"TRL": "sft"}, SETTINGS, rounds=3, steps=60, warmup=10)
