"""What experiment.py and rare.py compare: options of train.py by the label of a line of their tables."""

from typing import Any

Lines = dict[str, dict[str, Any]]

GOLD = {"method": "sft", "sft_target": "rationale"}
ABLATIONS: Lines = {
    "LaTRO": {},
    "SFT on answers": {"method": "sft"},
    "SFT on gold rationales": GOLD,
    "likelihood_coef=0": {"likelihood_coef": 0.0},
    "baseline=none": {"baseline": "none"},
    "kl_coef=0": {"kl_coef": 0.0},
}
START = "warm start"  # the line of the common start
COLUMNS = {
    "log p(y given x, z)": "likelihood/answer_logprob",
    "useful": "env/all/useful",
    "greedy": "test/env/all/correct",
    "sampled": "test/env/all/pass@1",
    "maj@8": "test/env/all/maj@8",
}
NORM = "gradient norm"


def last(line: str) -> str:
    """The line of the last checkpoint, where `line` is that of the best on the validation split."""
    return f"{line}, last checkpoint"
