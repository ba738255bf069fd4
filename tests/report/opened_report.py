"""A report of a small run, without the writers that are slow to start."""

import io

from phijax.report.config import LoggingConfig
from phijax.report.report import open_report

QUIET = dict(tensorboard=False, plot=False)


def opened(workdir, first_step=0, total_steps=10, stream=None, process_index=0, **config):
    return open_report(
        LoggingConfig(**(QUIET | config)),
        workdir,
        first_step=first_step,
        total_steps=total_steps,
        tokens_before=lambda step: 100 * step,
        flops_per_token=lambda step: 6.0,
        peak_flops_per_device=1e9,
        device_count=1,
        means={"loss": "predicted_tokens", "nll": "predicted_tokens", "margin": "pairs"},
        process_index=process_index,
        baselines={"uniform": 9.0},
        stream=stream or io.StringIO(),
    )
