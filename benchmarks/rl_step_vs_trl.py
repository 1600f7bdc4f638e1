"""One RL step of our loop against one of TRL 1.16's GRPOTrainer: 64 problems x 8 samples of the
arithmetic task, the same warm- started `tiny`.

    pip install --target /tmp/trl-site --no-deps trl==1.16.0      # beside the virtual environment, which stays as it is
    python benchmarks/rl_step_vs_trl.py [--rounds 2] [--steps 25]

Both sides sample up to 6 tokens at temperature 1 and take one AdamW step at 1e-4 in fp32, without
KL, clipping of gradients or division by the standard deviation. TRL samples with transformers'
generate, as it does on a CPU. Ours does more per step: it syncs weights into a second engine,
probes the sync, writes metrics and, every tenth step, a transcript; that is all counted. TRL_SITE
names another folder.
"""

import os
import sys
from functools import partial

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from benchmarks.clocked import GROUP_SIZE, GROUPS, LEARNING_RATE, MAX_TOKENS, run_rl
from benchmarks.race import race

SETTINGS = {
    "model": "tiny",
    "problems": GROUPS,
    "samples each": GROUP_SIZE,
    "max_tokens": MAX_TOKENS,
    "learning rate": LEARNING_RATE,
}
OURS = {f"ours, engine={engine}": partial(run_rl, engine=engine) for engine in ("vllm", "torch")}


if __name__ == "__main__":
    race(__doc__, "rl_step_vs_trl", OURS, {"TRL": "grpo"}, SETTINGS, rounds=2, steps=25, warmup=5)
