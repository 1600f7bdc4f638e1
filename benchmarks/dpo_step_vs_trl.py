"""One DPO step of our loop against one of TRL 1.16's DPOTrainer: 32 pairs, prompts of 96 tokens
with two answers of 49, the same `tiny`.

    pip install --target /tmp/trl-site --no-deps trl==1.16.0      # beside the virtual environment, which stays as it is
    python benchmarks/dpo_step_vs_trl.py [--rounds 3] [--steps 20]

Both take one AdamW step at 1e-4 in fp32 on all pairs at once, and report the mean loss and the peak
of resident memory above what the process held after its imports. TRL runs twice: as it comes, with
the reference a second model that is asked at every step, and with the reference's logprobs computed
before the first step, as ours are. That computation is in nobody's step. TRL_SITE names another
folder.
"""

import os
import sys

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from benchmarks.clocked import DPO_ANSWER, DPO_BATCH, DPO_PROMPT, LEARNING_RATE, run_dpo
from benchmarks.race import race

SETTINGS = {
    "model": "tiny",
    "pairs": DPO_BATCH,
    "prompt": DPO_PROMPT,
    "answer": DPO_ANSWER,
    "learning rate": LEARNING_RATE,
}
PEERS = {"TRL": "dpo", "TRL precomputed": "dpo_precomputed"}


if __name__ == "__main__":
    race(__doc__, "dpo_step_vs_trl", {"ours": run_dpo}, PEERS, SETTINGS, rounds=3, steps=20, warmup=3)
