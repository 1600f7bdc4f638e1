"""The README.md of an exported model: what it was trained from, the run's last metrics, figures of
an evaluation, settings, and how to load it. Folders of this machine are named by their last part.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.backend.architectures import kernel_of_attention
from posttrain.backend.checkpoint_files import SCALAR_HEAD_FILE
from posttrain.backend.errors import ConfigError, ModelError
from posttrain.backend.models import PRESETS, looks_like_path, model_config, whole_config
from posttrain.backend.text_models import text_model_of
from posttrain.tracking.jsonl import read_json
from posttrain.tracking.metrics_log import IMPORTANT, format_number, last_metrics, read_metrics
from posttrain.tracking.model_source import ModelSource
from posttrain.tracking.run_folder import RunFolder
from posttrain.tracking.settings import class_name

SHOWN = 12  # metrics


def model_card(
    source: ModelSource, name: str, adapter_base: str | None, is_adapter: bool, evaluation: Path | None
) -> str:
    """`adapter_base` is the base of an adapter, merged or not; `is_adapter`: the folder holds the
    adapter alone."""
    base = adapter_base or source.settings.get("load_checkpoint_path") or source.settings.get("model_name")
    is_scalar = bool(source.folder and (source.folder / SCALAR_HEAD_FILE).exists())
    library, task = "peft" if is_adapter else "transformers", "classification" if is_scalar else "generation"
    front = ["---", f"library_name: {library}", f"pipeline_tag: text-{task}", "tags: [posttrain-cookbook]"]
    front += [f"base_model: {base}"] if base and _on_hub(base) else []
    parts = ["\n".join([*front, "---"]), f"# {name}", _origin(base, source, is_adapter, is_scalar)]
    if source.run:
        parts.append(_metrics(source))
    if evaluation:
        parts.append(_evaluation(source, evaluation))
    opens, kernel = _opened_by(adapter_base or str(source.folder))
    if not is_adapter:
        opens = "AutoModelForCausalLM"  # a merged model is a text model, whatever its base is
    usage = _usage(name, base, is_adapter, opens, kernel)
    parts.append("## Use\n\n" + (_with_head(usage, name, is_adapter) if is_scalar else usage))
    if source.settings:
        settings = json.dumps(_without_paths(source.settings), indent=2, ensure_ascii=False)
        parts.append(f"## Settings of the run\n\n```json\n{settings}\n```")
    return "\n\n".join(parts) + "\n"


def _origin(base: str | None, source: ModelSource, is_adapter: bool, is_scalar: bool) -> str:
    kind = "A LoRA adapter" if is_adapter else "A model" if is_scalar else "A language model"
    kind += " that gives each token a number (a reward model, or a critic)" if is_scalar else ""
    of = f", trained from `{_short(base)}`" if base else ""
    task = class_name(source.settings, "env", "dataset")
    on = f" on `{task}`" if task else ""
    return f"{kind}{of}{on} with posttrain-cookbook."


def _metrics(source: ModelSource) -> str:
    assert source.run and source.folder
    records = read_metrics(source.run)
    if not records:
        return "## Training\n\nNo metrics were logged."
    name = source.folder.name
    checkpoints = RunFolder(source.run).list_checkpoints()
    step = next((record.step for record in checkpoints if record.name == name), records[-1]["step"] + 1)
    at = last_metrics(records)
    if step <= records[-1]["step"]:  # a checkpoint in the middle: what was logged just before it, and at it
        near = [record for record in records if step - 1 <= record["step"] <= step]
        at = {key: value for record in near for key, value in record.items() if value is not None}
    shown = [metric for metric in IMPORTANT if metric in at][:SHOWN]
    rows = [(metric, format_number(at[metric])) for metric in shown]
    return f"## Training\n\nAfter {step} steps, the last figures logged:\n\n{_table(('metric', 'value'), rows)}"


def _evaluation(source: ModelSource, folder: Path) -> str:
    """ConfigError if the evaluation is not of this model."""
    results = read_json(folder / "results.json", "give the folder of a finished posttrain-eval")
    model = next((model for model in results["models"] if model["label"] == source.label), None)
    if model is None:
        labels = ", ".join(model["label"] for model in results["models"])
        raise ConfigError(f"{folder} evaluates {labels}, not {source.label}: evaluate this model first")
    env = results["settings"]["env"]["class"].partition(":")[2]
    rows = [(metric, _estimate(estimate)) for metric, estimate in model["metrics"].items()]
    table = _table(("metric", "value"), rows)
    return f"## Evaluation\n\n`{env}`, {model['problems']} problems, mean ± standard error:\n\n{table}"


def _estimate(estimate: Mapping[str, Any]) -> str:
    if estimate["mean"] is None:
        return ""
    return f"{estimate['mean']:.4g}" + (f" ± {estimate['stderr']:.2g}" if estimate["stderr"] is not None else "")


def _opened_by(model: str) -> tuple[str, str | None]:
    """transformers' class, and the attn_implementation that it must be given; the usual ones also for a base that
    is not at hand."""
    try:
        has_more = text_model_of(whole_config(model)) is not None
        return f"AutoModelFor{'Multimodal' if has_more else 'Causal'}LM", kernel_of_attention(model_config(model))
    except ModelError:
        return "AutoModelForCausalLM", None


def _usage(name: str, base: str | None, is_adapter: bool, opens: str, kernel: str | None) -> str:
    option = f', attn_implementation="{kernel}"' if kernel else ""
    if is_adapter:
        loads = [
            "from peft import PeftModel",
            f"from transformers import {opens}",
            "",
            *(
                [f"# {base} is a preset of posttrain-cookbook: other tools need the merged model"]
                if base in PRESETS
                else []
            ),
            f'base = {opens}.from_pretrained("{_short(base) if base else "BASE"}"{option})',
            f'model = PeftModel.from_pretrained(base, "{name}")',
        ]
    else:
        loads = [
            f"from transformers import {opens}, AutoTokenizer",
            "",
            f'model = {opens}.from_pretrained("{name}"{option})',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        ]
    return "```python\n" + "\n".join(loads) + "\n```"


def _with_head(usage: str, name: str, is_adapter: bool) -> str:
    """Of a scalar model: its head lies beside the trunk, which transformers opens as a language model."""
    trunk = "model.base_model.model.base_model" if is_adapter else "model.base_model"
    lines = [
        "from safetensors.torch import load_file",
        "",
        f'head = load_file("{name}/{SCALAR_HEAD_FILE}")["weight"]  # (1, hidden size)',
        "",
        "",
        "def numbers(input_ids):  # of each token; a reward model's is that of an answer's last, its end token",
        f"    return ({trunk}(input_ids).last_hidden_state @ head.T.to(model.dtype))[..., 0]",
    ]
    return usage.removesuffix("\n```") + "\n" + "\n".join(lines) + "\n```"


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [head, ("---", "---:"), *rows]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)


def _on_hub(name: str) -> bool:
    return name not in PRESETS and "/" in name and not looks_like_path(name) and not Path(name).exists()


def _short(name: str) -> str:
    """A hub name or a preset whole, a path's last part."""
    return name if _on_hub(name) or name in PRESETS else Path(name).name


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and looks_like_path(value) else value
