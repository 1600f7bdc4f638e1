"""The local engine: torch trains, vLLM samples. Knows tokens and tensors; nothing of chat, environments or rewards."""
