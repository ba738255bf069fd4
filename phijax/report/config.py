"""Section `logging` of the config."""

from dataclasses import dataclass

from phijax.errors import UserError


@dataclass(frozen=True)
class LoggingConfig:
    """What a run tells about itself. metrics.jsonl and events.jsonl are always written."""

    every_steps: int = 10  # a line in metrics.jsonl and on the screen; evaluations always get one
    tensorboard: bool = True  # event files under WORKDIR/tensorboard
    wandb_project: str | None = None  # None: W&B is not even imported
    plot: bool = True  # loss.png in the workdir when the run ends
    profile_start: int | None = None  # first step of a jax.profiler trace, kept under WORKDIR/profile
    profile_steps: int = 3  # steps that the trace covers


def check(config: LoggingConfig, total_steps: int) -> None:
    """Raises UserError for values that cannot be meant."""
    if config.every_steps < 1:
        raise UserError(f"logging.every_steps={config.every_steps}: it is at least 1.")
    if config.profile_steps < 1:
        raise UserError(f"logging.profile_steps={config.profile_steps}: it is at least 1.")
    start = config.profile_start
    if start is not None and not 0 <= start < total_steps:
        raise UserError(
            f"logging.profile_start={start} is not a step of this run, which has steps 0 to {total_steps - 1}.  "
            f"Try --config.logging.profile_start={min(10, total_steps - 1)}"
        )
