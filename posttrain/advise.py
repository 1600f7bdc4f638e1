"""Usual settings for a model, a task and a LoRA rank, each with its source; and a warning where a
learning rate is far from them. Starting points for a search, not optima.

python -m posttrain.advise model_name=Qwen/Qwen3-0.6B task=rl lora_rank=32
"""

from typing import Literal

import chz

from posttrain.backend.lora_layers import check_rank
from posttrain.backend.models import PRESETS, model_config
from posttrain.backend.ranges import LEARNING_RATE, WHOLE
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import LoraConfig
from posttrain.renderers.types import Tokenizer
from posttrain.tracking.command_line import run_command

Task = Literal["sft", "rl", "dpo"]
SMALLEST_HIDDEN = 512  # the rules were found on models of 1,000 and more
FAR_OFF = 10.0  # times too high or too low

# LoRA, supervised: 5e-5 * 10 * (2000 / hidden) ** exponent
SFT_SOURCE = "Tinker's get_lr, fitted to sweeps of Qwen and Llama; LoRA at 10 times full training: Schulman et al. 2025"
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
# full training, LoRA, source
FIXED: dict[str, tuple[float, float, str]] = {
    "rl": (1e-6, 4e-5, "full: DeepSeekMath (Shao et al. 2024) and TRL's GRPO; LoRA: Tinker cookbook, rl_basic"),
    "dpo": (5e-7, 1e-5, "full: Zephyr (Tunstall et al. 2023); LoRA: Tinker cookbook, DPO"),
}
BATCHES: dict[str, str] = {
    "sft": "batch_size=128 (Tinker cookbook, sl_basic); LoRA bears large batches less well than full training "
    "(Schulman et al. 2025)",
    "rl": "groups_per_batch=64 group_size=8 to 16: 512 to 1024 rollouts a step (DeepSeekMath: 16 x 64, Tinker "
    "cookbook: 128 x 16)",
    "dpo": "batch_size=32 to 256 pairs (Tinker cookbook: 256; smaller ones without a checked source)",
}
RANKS: dict[str, str] = {
    "sft": "lora_rank=32 (Tinker's default); larger for a set with more completion tokens than the adapter has "
    "weights (Tinker's LoRA primer)",
    "rl": "lora_rank=8 to 32: RL learns few bits per rollout, rank 1 was enough in Schulman et al. 2025",
    "dpo": "lora_rank=32 (Tinker's default)",
}


def usual_learning_rate(task: Task, hidden_size: int, model_type: str, lora: bool) -> tuple[float, str]:
    """The rate and its source. The LoRA rank does not matter: the adapter is scaled by alpha / rank,
    with alpha 32."""
    if task in FIXED:
        full, adapter, source = FIXED[task]
        return (adapter if lora else full), source
    exponent = next((value for name, value in EXPONENTS.items() if name in model_type), EXPONENTS["qwen"])
    known = any(name in model_type for name in EXPONENTS)
    rate = 5e-5 * (10 if lora else 1) * (2000 / hidden_size) ** exponent
    return rate, SFT_SOURCE + ("" if known else f"; {model_type or 'this family'} as Qwen")


def recommended_renderer(model_name: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """The renderer's name and the reason."""
    base = model_name.rsplit("/", 1)[-1].lower().endswith(("-base", "-pt"))
    if not tokenizer.chat_template:
        return "role_colon", "the tokenizer has no chat template"
    if model_name in PRESETS:
        return "chat_template", "a preset's weights are random: any renderer serves"
    if base:
        return "role_colon", "a base model has not learnt its chat template, whose tokens may be untrained"
    if "enable_thinking" in str(tokenizer.chat_template):
        return "disable_thinking", "short answers without thinking; chat_template to let it think (raise max_tokens)"
    return "chat_template", "the model was trained on its template"


def warn_of_learning_rate(task: Task, model_name: str, lora_rank: int, learning_rate: float) -> str | None:
    """A line, printed too, where the rate is FAR_OFF from the usual one; None where it is not, or
    where nothing is known: presets, small models, a rate of 0."""
    if model_name in PRESETS or not learning_rate:
        return None
    hidden, model_type = _shape(model_name)
    if hidden < SMALLEST_HIDDEN:
        return None
    usual, _ = usual_learning_rate(task, hidden, model_type, lora_rank > 0)
    times = learning_rate / usual
    if 1 / FAR_OFF < times < FAR_OFF:
        return None
    trained = "an adapter" if lora_rank else "all weights"
    line = (
        f"WARNING learning_rate={learning_rate:g} is {_times(times)} what is usual for {task} of {trained} of "
        f"{model_name} ({usual:.1e}); posttrain-advise model_name={model_name} task={task} says why"
    )
    print(line, flush=True)
    return line


def _times(times: float) -> str:
    return f"{times:.0f} times" if times > 1 else f"1/{1 / times:.0f} of"


def _shape(model_name: str) -> tuple[int, str]:
    """Hidden size and model type; (0, "") where the configuration has none."""
    text = model_config(model_name).get_text_config()
    return int(getattr(text, "hidden_size", 0) or 0), str(getattr(text, "model_type", ""))


# --- the command ----------------------------------------------------------------------------------


@chz.chz
class Config:
    """Usual settings for a model, and their sources."""

    model_name: str = chz.field(doc="a local folder or a Hugging Face hub name; config and tokenizer are read")
    task: Task = chz.field(default="sft", doc="sft, rl or dpo")
    lora_rank: int = chz.field(default=0, validator=WHOLE, doc="rank of an adapter; 0 = all weights are trained")
    learning_rate: float | None = chz.field(
        default=None,
        validator=LEARNING_RATE,
        doc="a learning rate to compare with the usual one, where a rule is known",
    )


def main(config: Config) -> str:
    if config.lora_rank:
        check_rank(config.model_name, LoraConfig(config.lora_rank))
    hidden, model_type = _shape(config.model_name)
    renderer, reason = recommended_renderer(config.model_name, load_tokenizer(config.model_name))
    lines = [f"{config.model_name}: {model_type}, hidden size {hidden}; {config.task}", ""]
    known = config.model_name not in PRESETS and hidden >= SMALLEST_HIDDEN
    if not known:
        lines.append(
            f"learning_rate: no rule is known of presets, or below hidden size {SMALLEST_HIDDEN}; try 1e-3 and 3e-4"
        )
    else:
        for lora, name in ((False, "all weights"), (True, "LoRA")):
            rate, source = usual_learning_rate(config.task, hidden, model_type, lora)
            marked = "->" if lora == bool(config.lora_rank) else "  "
            lines.append(f"{marked} learning_rate={rate:.1e}  {name}  ({source})")
        lines.append("   any rank: the adapter is scaled by lora_alpha / lora_rank, lora_alpha=32")
    lines += [BATCHES[config.task], RANKS[config.task], f"renderer_name={renderer}: {reason}"]
    print("\n".join(lines))
    if config.learning_rate and known:
        warned = warn_of_learning_rate(config.task, config.model_name, config.lora_rank, config.learning_rate)
        print("" if warned else f"learning_rate={config.learning_rate:g} is not far off")
    return "\n".join(lines)


def command() -> None:
    run_command(main, Config)


if __name__ == "__main__":
    command()
