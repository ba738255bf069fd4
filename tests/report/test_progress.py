import io

import pytest

from phijax.report.progress import LiveProgress, PlainProgress, duration, open_progress

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
        "  held-out wiki 4.5000\n"
    )


def test_what_is_not_known_is_not_shown_and_skipped_steps_are():
    stream = io.StringIO()
    PlainProgress(stream, 9).line({"step": 0, "loss": float("nan"), "mfu": None, "skipped_steps": 2.0}, None)
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
    assert "step 20  loss 4.1234  held-out wiki 4.5000" in shown and "checkpoint 20 [saved]" in shown
    assert "\x1b[" in shown


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (99, "99 s"), (100, "1:40 min"), (3599, "59:59 min"), (11_100, "3:05 h"), (187_200, "2 d 4 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
