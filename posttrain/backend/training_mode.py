"""What layers do in training mode alone, dropout and routers' noise, is off: RL compares logprobs of one
distribution. Layers that recompute their activations for the backward pass need the mode.
"""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from posttrain.backend.errors import ConfigError

# Nothing in a layer is random. torch would put the global generators back to where they were in the forward pass,
# and with them those that an engine draws from meanwhile.
CHECKPOINTING = {"use_reentrant": False, "preserve_rng_state": False}


def switch_off_dropout(model: nn.Module) -> None:
    """Modules of dropout, and the probabilities that layers hand to functions (of dropout, of skipped layers)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _switch_off(module)


def _switch_off(owner: object) -> None:
    for name, value in list(vars(owner).items()):
        if "drop" in name and isinstance(value, float):
            setattr(owner, name, 0.0)


def checkpoint_gradients(hf_model: PreTrainedModel, model_name: str) -> None:
    # the newer name, which alone is left in transformers 6
    enable = getattr(hf_model, "activation_checkpointing_enable", None) or hf_model.gradient_checkpointing_enable
    try:
        enable(CHECKPOINTING)
    except ValueError as error:
        raise ConfigError(
            f"backend.gradient_checkpointing: transformers cannot recompute the layers of {model_name!r}: leave it out"
        ) from error
    # the frozen embedding of a LoRA run would cut the recomputed graph
    hf_model.enable_input_require_grads()
    # Layers recompute in training mode alone, in which routers add noise: their modules stay in evaluation mode.
    config = copy.copy(hf_model.config)
    _switch_off(config)
    module: Any
    for module in hf_model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))
        if module.training and getattr(module, "config", None) is hf_model.config and module is not hf_model:
            module.config = config  # Falcon's layers read it there
