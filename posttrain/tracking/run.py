"""A training run: everything around its steps: resume, evaluation, timing, logs, checkpoints,
stopping, progress.

  run = Run(config=config, folder=folder, client=client, name="sft", num_steps=1000, evaluate=evaluate)
  run.start(config.load_checkpoint_path)
  metrics = await run.steps(step)  # async def step(number, metrics): trains, and adds to the metrics
"""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from posttrain.backend.alarms import Alarms
from posttrain.backend.errors import (
    ConfigError,
    CookbookError,
    LogprobGapError,
    NonFiniteError,
    OutOfMemoryError,
    TrainerLostError,
)
from posttrain.backend.extras import how_to_install, is_installed
from posttrain.tracking.checkpointing import Checkpointed, Checkpointer
from posttrain.tracking.frozen_heap import startup_objects_frozen
from posttrain.tracking.metrics_log import Metrics, MetricsLog, print_last_metrics, read_last_metrics, timed
from posttrain.tracking.plots import plot_run
from posttrain.tracking.progress import TrainingProgress, reported
from posttrain.tracking.run_config import RunConfig, TrainingConfig
from posttrain.tracking.run_folder import RunFolder
from posttrain.tracking.step_profile import StepProfile
from posttrain.tracking.stop_request import StopRequest

Step = Callable[[int, Metrics], Awaitable[None]]
Evaluation = Callable[[int], Awaitable[Metrics]]

# After these the trainer's weights are not to be saved.
NOTHING_SAVED = (LogprobGapError, NonFiniteError, OutOfMemoryError, TrainerLostError)
# Metrics of a step that count its tokens: of supervised steps, and of rollouts.
TOKENS = ("num_tokens", "env/all/total_ac_tokens", "env/all/total_ob_tokens")


@dataclass(kw_only=True)
class Run:
    """An evaluation precedes its step and sees its starting weights; there is one more at the end."""

    config: RunConfig
    folder: RunFolder
    client: Checkpointed
    name: str
    num_steps: int
    """This call ends before step `num_steps`."""
    headline: Mapping[str, str] = field(default_factory=dict)
    """Metrics beside the progress bar -> their short names."""
    evaluate: Evaluation | None = None
    """Held-out metrics before step `number`."""
    infrequent: Evaluation | None = None
    """More of them, before every `infrequent_every` steps and at the end."""
    infrequent_every: int = 0
    alarms: Alarms | None = None
    extra: Callable[[], dict[str, Any]] = dict
    """A mid-run checkpoint's data besides the weights; `resumed_extra` after a resume."""
    ends_early: Callable[[Metrics], bool] | None = None
    """Whether the step with these metrics is the last."""
    must_stop: Callable[[StopRequest], bool] = bool
    """For processes that stop together: recipes/libraries/belief_state/distributed.py."""
    final_name: str | None = "final"
    """The last checkpoint. None: the next step's number, for a run that another call continues."""

    def start(self, load_checkpoint_path: str | None) -> bool:
        """Loads the initial state. False if the run has ended: `last_metrics` are its result."""
        config = self.config
        if config.save_minutes is not None and self.must_stop is not bool:
            raise ConfigError("save_minutes: processes that train together save by steps; use save_every")
        when = config.save_every, config.keep_checkpoints, config.save_minutes, config.save_tokens
        self._checkpointer = Checkpointer(self.folder, self.client, *when)
        self.first_step = self._checkpointer.start(load_checkpoint_path, self.num_steps, self.ends_early is not None)
        self.resumed_extra = self._checkpointer.resumed_extra
        if self._checkpointer.finished and not self._checkpointer.nothing_left:
            self._say_if_the_rate_jumps()
        return not self._checkpointer.nothing_left

    def _say_if_the_rate_jumps(self) -> None:
        """A schedule that had come to its end falls to the new last step instead."""
        if isinstance(self.config, TrainingConfig) and self.config.lr_schedule != "constant":
            ended, now = (self.config.adam(self.first_step - 1, n) for n in (self.first_step, self.num_steps))
            print(
                f"this run had finished: with lr_schedule={self.config.lr_schedule} to step {self.num_steps} its learning "
                f"rate rises again, from {ended.learning_rate:.3g} to {now.learning_rate:.3g}"
            )

    def _evaluations(self, step: int | None = None) -> list[Evaluation]:
        """Those before `step`; None: all."""
        both = ((self.evaluate, self.config.eval_every), (self.infrequent, self.infrequent_every))
        return [evaluate for evaluate, every in both if evaluate and (step is None or (every and step % every == 0))]

    async def _evaluated(self, evaluate: Evaluation, done: int) -> Metrics:
        """After `done` steps. An evaluation that fails, as a user's may, loses none of them."""
        try:
            return await reported(evaluate(done), "evaluating")
        except NOTHING_SAVED:
            raise
        except Exception:
            if done > self.first_step and self.must_stop is bool:  # not where processes save together
                with suppress(CookbookError, OSError):
                    self._checkpointer.save_once(done, self.extra)
                    print(f"the evaluation after step {done} failed; the state is saved", flush=True)
            raise

    def last_metrics(self) -> Metrics:
        return read_last_metrics(self.folder.path)

    async def steps(self, train_step: Step) -> Metrics:
        """Runs the remaining steps; returns the last metrics."""
        config, checkpointer, metrics, headline, done = self.config, self._checkpointer, {}, {}, self.first_step
        profile = StepProfile(self.folder.path / "profile", self.first_step + 1, config.profile_steps)
        with (
            self.folder.lock.running(self.folder.opening) if self.folder.lock else nullcontext(),
            startup_objects_frozen(),
            closing(MetricsLog(self.folder, config)) as log,
            StopRequest() as stop,
            TrainingProgress(self.num_steps, self.first_step, self.name) as progress,
        ):
            for step in range(self.first_step, self.num_steps):
                metrics = {}
                with timed(metrics, "total"):
                    for evaluate in self._evaluations(step):
                        with timed(metrics, "eval"):
                            metrics |= await self._evaluated(evaluate, done)
                    with profile.step(step):
                        await train_step(step, metrics)
                metrics |= self.alarms.metrics() if self.alarms else {}
                log.log(metrics, step)
                if self.alarms:
                    self.alarms.decide(f"step {step}")
                done = step + 1
                checkpointer.after_step(done, self.extra, sum(metrics.get(name, 0) for name in TOKENS))
                headline |= {short: metrics[name] for name, short in self.headline.items() if name in metrics}
                progress.update(step, headline)
                if self.ends_early and self.ends_early(metrics):
                    break
                if self.must_stop(stop) and done < self.num_steps:
                    checkpointer.interrupted(done, self.extra)
            profile.finish()
            final: Metrics = {}
            for evaluate in self._evaluations():
                final |= await self._evaluated(evaluate, done)
            if final:
                log.log(final, done)
                metrics |= final
            checkpointer.save(self.final_name or f"{done:06d}", done)
        return metrics


def finish(folder: RunFolder, metrics: Mapping[str, float]) -> None:
    """The end of a command: prints the last metrics, and the paths of plot, transcripts and model. A run
    without matplotlib has no plot, which is no reason to fail at its end."""
    print_last_metrics(folder, metrics)
    has_plots = is_installed("matplotlib")
    print(f"plot: {plot_run(folder.path) if has_plots else 'none; ' + how_to_install('matplotlib')}")
    if any(folder.transcripts.iterdir()):
        print(f"transcripts: {folder.transcripts}")
    print(f"checkpoint: {folder.checkpoints / 'final'}")
