"""Preference optimisation from the command line.

python preference/train_cli.py dataset=pairs.jsonl model_name=small
load_checkpoint_path=runs/sft/checkpoints/final python -m preference.train_cli dataset=ultrafeedback
method=rpo method.nll_coef=0.5 model_name=Qwen/Qwen2.5-0.5B-Instruct
"""

# run as a file: this folder, first on the path, has a types.py that would shadow the standard
# library's
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from posttrain.tracking.command_line import run_command
from preference import train_dpo
from preference.names import DATASETS, METHODS
from preference.train_dpo import Config


def main() -> None:
    run_command(train_dpo.main, Config, {"dataset": DATASETS, "method": METHODS})


if __name__ == "__main__":
    main()
