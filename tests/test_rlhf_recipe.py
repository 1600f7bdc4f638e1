"""The three-stage recipe with few steps: every stage leaves its product, is not repeated, and the
curve is drawn.
"""

import asyncio

import chz
import pytest

from envs.kind_words import KindWordsComparisons
from posttrain.backend.errors import ConfigError
from posttrain.tracking.jsonl import read_jsonl
from posttrain.tracking.metrics_log import read_metrics
from recipes.rlhf import train
from tests.conftest import GAP_OF_A_COMMAND
from tests.jsonl_files import write


def test_rlhf_stages_run_in_order_and_only_once(tmp_path, capsys):
    small = train.Config(
        log_path=str(tmp_path), sft_steps=3, num_comparisons=80, reward_model_epochs=1, rl_steps=1, max_tokens=12
    )
    with pytest.raises(ConfigError, match="stages=ppo: the stages are sft, comparisons"):
        asyncio.run(train.main(chz.replace(small, stages="ppo")))
    asyncio.run(train.main(chz.replace(small, stages="sft,comparisons")))
    file = tmp_path / "comparisons.jsonl"
    rows = read_jsonl(file)
    assert len(rows) == 80 and {row["label"] for row in rows} <= {"A", "B", "Tie"}
    # Three steps of imitation write no words, and all is a tie. So the test puts people's notes in
    # their place.
    notes = [(one.comparison, one.label) for one in KindWordsComparisons(num_train=80)()[0]]
    rows = [
        {"prompt": c.prompt_conversation, "completion_A": c.completion_A, "completion_B": c.completion_B}
        for c, _ in notes
    ]
    labels = [{"label": label} for _, label in notes]
    write(file, *(row | label for row, label in zip(rows, labels, strict=True)))
    asyncio.run(train.main(small))
    for stage in ("rl", "rl_no_penalty"):
        first = read_metrics(tmp_path / stage)[0]
        assert {"env/all/gold", "env/all/proxy"} <= first.keys() and abs(
            first["kl_policy_base"]
        ) < GAP_OF_A_COMMAND  # it began at the reference
    assert (tmp_path / "curve.png").exists()
    capsys.readouterr()
    asyncio.run(train.main(small))
    assert capsys.readouterr().out.count("is there") == 5
