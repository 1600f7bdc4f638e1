"""Preference optimisation from the command line.

python preference/train_cli.py dataset=pairs.jsonl model_name=small \\
    load_checkpoint_path=runs/sft/checkpoints/final
python -m preference.train_cli dataset=ultrafeedback method=rpo method.nll_coef=0.5
"""

# run as a file, this folder is first on the path, and its types.py would shadow the standard one
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from posttrain.tracking.command_line import run_command
from posttrain.tracking.metrics_log import Metrics
from preference.config import Config
from preference.names import DATASETS, METHODS
from supervised.names import EVALUATOR_OPTIONS


async def trained(config: Config) -> Metrics:
    from preference import train_dpo  # with torch, for which --help and errors do not wait

    return await train_dpo.main(config)


def main() -> None:
    run_command(trained, Config, {"dataset": DATASETS, "method": METHODS} | EVALUATOR_OPTIONS)


if __name__ == "__main__":
    main()
