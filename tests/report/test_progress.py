import io
import re

import pytest

from phijax.report.progress import GOODPUT, LiveProgress, PlainProgress, duration, open_progress

VALUES = {
    "step": 20, "loss": 4.12344, "learning_rate": 3e-4, "grad_norm": 1.234, "skipped_steps": 0,
    "heldout_loss/wiki": 4.5, "tokens_per_second": 52_345.0, "mfu": 0.3124, "goodput": 0.951,
}  # fmt: skip


def test_plain_line():
    stream = io.StringIO()
    progress = open_progress(stream, 0, 600)
    assert isinstance(progress, PlainProgress)
    progress.step(20)
    progress.line(VALUES, 75.4)
    assert stream.getvalue() == (
        "step 20/600  loss 4.1234  lr 3.00e-04  grad 1.23  52.3k tokens/s  MFU 31.2%  goodput 95%  75 s left"
        f"  held-out wiki 4.5000\n{GOODPUT}\n"
    )
    progress.line(VALUES | {"step": 40}, None)
    assert stream.getvalue().count(GOODPUT) == 1


def test_what_is_not_known_is_not_shown_and_skipped_steps_are():
    stream = io.StringIO()
    values = {"step": 0, "loss": float("nan"), "mfu": None, "skipped_steps": 2.0, "goodput": 0.0}
    PlainProgress(stream, 9).line(values, None)
    assert stream.getvalue() == "step 0/9  loss nan  SKIPPED 2\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_live_line_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    stream = Terminal()
    progress = open_progress(stream, 10, 600)
    assert isinstance(progress, LiveProgress)
    progress.step(20)
    progress.line(VALUES, 75.4)
    progress.say("checkpoint 20 [saved]")
    progress.close()
    shown = stream.getvalue()
    assert "step 21/600" in shown and "52.3k tokens/s" in shown and "75 s left" in shown
    logged = "step 20/600  loss 4.1234  lr 3.00e-04  grad 1.23  52.3k tokens/s  MFU 31.2%  goodput 95%  held-out wiki"
    assert f"{logged} 4.5000" in shown and "checkpoint 20 [saved]" in shown
    assert "\x1b[" in shown


@pytest.mark.parametrize("columns", [60, 80])
def test_a_narrow_terminal_keeps_the_bar_the_total_and_the_time_left(monkeypatch, columns):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    stream = Terminal()
    progress = open_progress(stream, 100_000, 1_600_000)
    progress.step(123_455)
    progress.line(VALUES | {"step": 123_455, "skipped_steps": 3}, 187_200.0)
    progress.close()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    live = [line for line in re.split(r"[\r\n]+", plain) if "━" in line or "╸" in line][-1]
    assert "step 123456/1600000" in live and "2 d 4 h left" in live and "loss 4" in live
    assert live.count("━") + live.count("╸") + live.count("╺") == 16 and len(live) <= columns
    assert "step 123455/1600000  loss 4.1234  lr 3.00e-04" in plain


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (99, "99 s"), (100, "1:40 min"), (3599, "59:59 min"), (11_100, "3:05 h"), (187_200, "2 d 4 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
