"""Where metrics go besides metrics.jsonl, on request: Weights & Biases, TensorBoard, Trackio.

Each is a pair of functions. What was logged after the checkpoint of a resumed run is logged again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from posttrain.backend.errors import ConfigError, one_line
from posttrain.backend.extras import missing
from posttrain.tracking.run_folder import RunFolder
from posttrain.tracking.settings import config_to_json

if TYPE_CHECKING:  # commands that need no model do not import torch
    from posttrain.tracking.run_config import RunConfig

# Seconds that wandb may take to reach its server at the start, and to send the rest at the end.
START_TIMEOUT, END_TIMEOUT = 60, 60


@dataclass(frozen=True)
class Logger:
    log: Callable[[Mapping[str, float], int], Any]
    """Metrics of a step."""
    close: Callable[[], Any]


def open_loggers(run: RunFolder, config: "RunConfig") -> list[Logger]:
    """Those that the configuration asks for. ConfigError where one is not installed or not
    reached."""
    loggers = []
    if config.wandb_project:
        loggers.append(_wandb(run, config.wandb_project, config))
    if config.tensorboard:
        loggers.append(_tensorboard(run))
    if config.trackio_project:
        loggers.append(_trackio(run, config.trackio_project, config))
    return loggers


def _wandb(run: RunFolder, project: str, config: "RunConfig") -> Logger:
    wandb = _import("wandb", f"wandb_project={project}", "wandb")
    id_file = run.path / "wandb_run_id.txt"
    run_id = id_file.read_text().strip() if id_file.exists() else None
    try:
        logged = wandb.init(
            project=project,
            name=config.wandb_name,
            id=run_id,
            resume="allow" if run_id else None,
            dir=str(run.path),
            config=config_to_json(config),
            settings=wandb.Settings(init_timeout=START_TIMEOUT, finish_timeout=END_TIMEOUT),
        )
    except wandb.Error as error:
        raise ConfigError(
            f"wandb_project={project}: {one_line(error, 200)}; log in with `wandb login`, or set WANDB_MODE=offline and send the run "
            "later with `wandb sync`"
        ) from error
    id_file.write_text(logged.id + "\n")
    return Logger(lambda metrics, step: logged.log(dict(metrics), step=step), logged.finish)


def _tensorboard(run: RunFolder) -> Logger:
    writer = _import("torch.utils.tensorboard", "tensorboard=true", "tensorboard").SummaryWriter(
        str(run.path / "tensorboard")
    )

    def log(metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return Logger(log, writer.close)


def _trackio(run: RunFolder, project: str, config: "RunConfig") -> Logger:
    trackio = _import("trackio", f"trackio_project={project}", "trackio")
    trackio.init(project=project, name=run.path.resolve().name, config=config_to_json(config), resume="allow")
    return Logger(lambda metrics, step: trackio.log(dict(metrics), step=step), trackio.finish)


def _import(module: str, option: str, extra: str) -> Any:
    """Here, and not before, since each takes seconds."""
    try:
        return import_module(module)
    except ImportError:
        raise missing(extra, option) from None
