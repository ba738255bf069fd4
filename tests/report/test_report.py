import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from opened_report import opened

from phijax.errors import UserError
from phijax.report.config import LoggingConfig
from phijax.report.meter import Meter
from phijax.report.report import EventLog, Report
from phijax.report.writers import JsonLines, read_metrics


@jax.jit
def step_fn(x):
    """A step in little: new state, and metrics on the device."""
    return x + 1, {"loss": 1 / (x + 3), "skipped_steps": jnp.int32(0)}


def lines(workdir):
    return read_metrics(workdir / "metrics.jsonl")


def events(workdir, *names):
    return [event for event in read_metrics(workdir / "events.jsonl") if event["event"] in names]


def test_each_step_in_order_with_the_devices_own_bits(tmp_path):
    x, expected = jnp.float32(0), []
    with opened(tmp_path, every_steps=1) as report:
        for step in range(10):
            x, metrics = step_fn(x)
            before = report.add(step, metrics)
            assert before == (None if step == 0 else (step - 1, {"loss": expected[-1], "skipped_steps": 0}))
            expected.append(float(metrics["loss"]))
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == list(range(10))
    assert [row["loss"] for row in rows] == expected
    assert [row["tokens"] for row in rows] == [100 * (step + 1) for step in range(10)]
    assert rows[0]["tokens_per_second"] is None  # the first step compiles
    for row in rows[1:]:
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 6 / 1e9)
        assert row["step_seconds"] == pytest.approx(100 / row["tokens_per_second"])
        assert 0 < row["goodput"] <= 1 and row["host_memory_bytes"] > 1e7


def test_a_step_is_read_only_when_the_next_one_has_been_dispatched(monkeypatch):
    order = []
    monkeypatch.setattr(jax, "device_get", lambda metrics: order.append(("read", metrics["loss"])) or metrics)
    meter = type("Meter", (), dict(step_done=lambda self, step: None))()
    report = Report(LoggingConfig(), 0, 100, meter)
    for step in range(4):
        order.append(("dispatched", step))
        report.add(step, {"loss": step})
    assert order == [
        *[("dispatched", 0), ("dispatched", 1), ("read", 0)],
        *[("dispatched", 2), ("read", 1), ("dispatched", 3), ("read", 2)],
    ]


def test_which_steps_get_a_line(tmp_path):
    with opened(tmp_path, every_steps=4, total_steps=11) as report:
        for step in range(11):
            report.add(step, {"loss": 1.0})
            if step == 6:
                with report.pause():
                    values = {"heldout_loss/wiki": 2.5}
                report.add(step, values)
            if step % 3 == 0:
                report.flush()
    assert [row["step"] for row in lines(tmp_path)] == [0, 4, 6, 8, 10]
    assert [row.get("heldout_loss/wiki") for row in lines(tmp_path)] == [None, None, 2.5, None, None]


def test_flush_puts_the_newest_line_on_the_disk_before_a_save(tmp_path):
    report = opened(tmp_path, every_steps=1)
    report.add(0, {"loss": 1.0})
    assert lines(tmp_path) == []
    report.flush()
    assert [row["step"] for row in lines(tmp_path)] == [0]
    with pytest.raises(ValueError, match="step 0 is written already"):
        report.add(0, {"heldout_loss/wiki": 1.0})
    report.close()
    report.close()
    assert [row["step"] for row in lines(tmp_path)] == [0]


def test_a_stopped_run_writes_its_last_step_whatever_its_number(tmp_path):
    with opened(tmp_path, every_steps=10, total_steps=100) as report:
        for step in range(4):
            report.add(step, {"loss": 1.0})
    assert [row["step"] for row in lines(tmp_path)] == [0, 3]
    (stopped,) = events(tmp_path, "stopped")
    assert stopped["step"] == 4


def test_the_loops_slips_are_refused(tmp_path):
    report = opened(tmp_path)
    with pytest.raises(ValueError, match="step 1 came where those of step 0 were due"):
        report.add(1, {"loss": 1.0})
    report.add(0, {"loss": 1.0})
    with pytest.raises(ValueError, match=r"has \['loss'\] already"):
        report.add(0, {"loss": 2.0})
    report.add(0, {"goodput": 2.0})
    with pytest.raises(ValueError, match="report's own metrics"):
        report.flush()


def test_an_error_of_the_loop_is_not_hidden_by_the_report(tmp_path):
    class Died:
        def __array__(self, *arguments, **keywords):
            raise RuntimeError("the device is gone")

    with pytest.raises(KeyError, match="loader") as caught:
        with opened(tmp_path, every_steps=1) as report:
            report.add(0, {"loss": 1.0})
            report.add(1, {"loss": Died()})
            raise KeyError("loader")
    assert "the device is gone" in caught.value.__notes__[0]
    assert [row["step"] for row in lines(tmp_path)] == [0]


def test_goodput_goes_on_over_restarts(tmp_path):
    now = [1000.0]

    def life(first, last, seconds_a_step):
        workdir = epath.Path(tmp_path)
        meter = Meter(lambda step: step, lambda step: 1.0, None, 1, clock=lambda: now[0])
        log = EventLog(workdir, first, clock=lambda: now[0])
        report = Report(LoggingConfig(every_steps=1), first, 100, meter, [JsonLines(workdir, first)], log)
        for step in range(first, last):
            report.add(step, {"loss": 1.0})
            now[0] += seconds_a_step
            with report.pause():
                now[0] += 1.0  # a save
            report.flush()
        report.close()

    life(0, 6, seconds_a_step=2.0)  # 18 s, of which steps 1 .. 5 are useful: 10 s
    now[0] += 20.0
    life(4, 8, seconds_a_step=4.0)  # 20 s; steps 4 and 5 again, and step 4 is this life's first: 3 * 4 s
    assert [row["step"] for row in lines(tmp_path)] == list(range(8))
    assert lines(tmp_path)[-1]["goodput"] == (6.0 + 12.0) / (18 + 20 + 20)


def test_a_step_that_ends_in_a_pause_keeps_its_time():
    now = [0.0]

    class OnDevice:
        """A value that the device has at time `at`: reading it waits till then."""

        def __init__(self, at):
            self.at = at

        def __array__(self, *arguments, **keywords):
            now[0] = max(now[0], self.at)
            return np.ones((), np.float32)

    meter = Meter(lambda step: step, lambda step: 1.0, None, 1, clock=lambda: now[0])
    report = Report(LoggingConfig(), 0, 100, meter)
    report.add(0, {"loss": OnDevice(5.0)})
    report.add(1, {"loss": OnDevice(8.0)})
    with report.pause():
        np.asarray(OnDevice(8.0))  # an evaluation waits for the parameters, then
        now[0] += 100.0
    report.add(2, {"loss": OnDevice(111.0)})
    report.close()
    assert meter.useful_seconds == 3.0 + 3.0


def test_other_processes_write_nothing_and_read_in_step(tmp_path):
    with opened(tmp_path, process_index=1, every_steps=1) as report:
        assert report.add(0, {"loss": 1.0}) is None
        assert report.add(1, {"loss": 2.0}) == (0, {"loss": 1.0})
        with report.pause():
            report.say("not shown")
        report.flush()
    assert list(tmp_path.iterdir()) == []


def test_plot_and_tensorboard_are_there_at_the_end(tmp_path):
    stream = io.StringIO()
    with opened(tmp_path, plot=True, tensorboard=True, stream=stream, every_steps=1) as report:
        report.add(0, {"loss": 1.0})
        report.say("hello")
    assert (tmp_path / "loss.png").exists() and list((tmp_path / "tensorboard").iterdir())
    assert stream.getvalue().startswith("hello\nstep 0/10  loss 1.0000")


def test_trace_of_a_step_range(tmp_path):
    stream, x = io.StringIO(), jnp.float32(0)
    with opened(tmp_path, profile_start=2, profile_steps=2, stream=stream) as report:
        for step in range(6):
            x, metrics = step_fn(x)
            report.add(step, metrics)
            assert (tmp_path / "profile").exists() == (step >= 1)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert "trace of the steps up to 3 is written" in stream.getvalue()


def test_a_trace_that_the_restart_has_passed_is_said_to_be_missing(tmp_path):
    stream = io.StringIO()
    opened(tmp_path, first_step=5, profile_start=2, stream=stream).close()
    assert "no trace: logging.profile_start=2" in stream.getvalue()


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(every_steps=0), "logging.every_steps=0"),
        (dict(profile_start=10), "logging.profile_start=10 is not a step of this run, which has steps 0 to 9"),
        (dict(profile_start=1, profile_steps=0), "logging.profile_steps=0"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        opened(tmp_path, **config)
    assert list(tmp_path.iterdir()) == []


CHILD = """
import sys, os, signal
sys.path[:0] = [{root!r}, {here!r}]
from pathlib import Path
from opened_report import opened
report = opened(Path(sys.argv[1]), first_step=int(sys.argv[2]), total_steps=1000, every_steps=1)
for step in range(int(sys.argv[2]), 1000):
    report.add(step, {{"loss": 1 / (step + 1)}})
    if step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    if step % 10 == 9:
        report.flush()
        Path(sys.argv[1], "checkpoint").write_text(str(step + 1))
report.close()
"""


def test_sigkill_and_restart_leave_the_file_of_an_unbroken_run(tmp_path):
    code = CHILD.format(root=str(Path(__file__).parents[2]), here=str(Path(__file__).parent))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    first_step = 0
    for last, expected in ((50, -signal.SIGKILL), (119, -signal.SIGKILL), (5000, 0)):
        arguments = [sys.executable, "-c", code, str(tmp_path), str(first_step), str(last)]
        child = subprocess.run(arguments, env=environment, capture_output=True, text=True)
        assert child.returncode == expected, child.stderr
        first_step = int((tmp_path / "checkpoint").read_text())
    assert [(row["step"], row["loss"]) for row in lines(tmp_path)] == [(step, 1 / (step + 1)) for step in range(1000)]
    assert [event["step"] for event in events(tmp_path, "start")] == [0, 50, 110]


def test_the_mean_over_nothing_is_not_zero(tmp_path):
    """Each by its own divisor."""
    with opened(tmp_path, every_steps=1, total_steps=2) as report:
        for step, (tokens, pairs) in enumerate([(0, 3), (5, 0)]):
            means = {name: jnp.float32(step) for name in ("loss", "nll", "margin")}
            report.add(step, means | {"predicted_tokens": jnp.float32(tokens), "pairs": jnp.float32(pairs)})
    first, second = lines(tmp_path)
    assert np.isnan(first["loss"]) and np.isnan(first["nll"]) and first["predicted_tokens"] == 0
    assert first["margin"] == 0 and np.isnan(second["margin"])
    assert (second["loss"], second["nll"]) == (1, 1)
