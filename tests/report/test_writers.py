import json
import math
import random
import struct
import sys
import types

import numpy as np
import pytest
from etils import epath

from phijax.errors import UserError
from phijax.report import writers
from phijax.report.writers import JsonLines, LineFile, TensorBoard, Wandb, encode, read_metrics


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def steps_in(path):
    return [row["step"] for row in read_metrics(path)]


def test_floats_come_back_bit_for_bit(workdir):
    random.seed(0)
    patterns = [random.getrandbits(32) for _ in range(2000)] + [0, 1, 0x80000000, 0x7F7FFFFF, 0x00800000]
    values = [struct.unpack("<f", struct.pack("<I", bits))[0] for bits in patterns]
    lines = JsonLines(workdir, 0)
    for step, value in enumerate(values):
        lines.write({"step": step, "loss": np.asarray(value, np.float32).item(), "double": value / 3})
    lines.close()
    for row, value in zip(read_metrics(workdir / "metrics.jsonl"), values, strict=True):
        if math.isnan(value):
            assert math.isnan(row["loss"])
            continue
        assert struct.pack("<f", row["loss"]) == struct.pack("<f", value)
        assert struct.pack("<d", row["double"]) == struct.pack("<d", value / 3)


def test_what_is_not_finite_stays_valid_json(workdir):
    line = encode({"step": 1, "loss": math.nan, "grad_norm": math.inf, "low": -math.inf, "mfu": None})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    strict = json.loads(line, parse_constant=refuse)
    assert strict == {"step": 1, "loss": "NaN", "grad_norm": "Infinity", "low": "-Infinity", "mfu": None}
    (workdir / "metrics.jsonl").write_text(line + "\n")
    (row,) = read_metrics(workdir / "metrics.jsonl")
    assert math.isnan(row["loss"]) and row["grad_norm"] == math.inf and row["low"] == -math.inf and row["mfu"] is None


def test_a_restart_holds_each_step_once_and_loses_nothing(workdir):
    dead = JsonLines(workdir, 0)
    for step in range(8):
        dead.write({"step": step, "loss": 8.0 - step})
    path = workdir / "metrics.jsonl"
    before = path.read_bytes()[:-9]  # SIGKILL in the middle of a line
    path.write_bytes(before)
    again = JsonLines(workdir, 5)
    assert again.superseded == 3
    for step in range(5, 10):
        again.write({"step": step, "loss": 8.0 - step})
    again.close()
    assert steps_in(path) == list(range(10))
    kept = path.read_bytes().splitlines(keepends=True)[:5]
    superseded = (workdir / "metrics.superseded.jsonl").read_bytes()
    assert b"".join(kept) + superseded == before + b"\n"
    # a third start adds to what was put aside
    assert JsonLines(workdir, 9).superseded == 1
    assert (workdir / "metrics.superseded.jsonl").read_bytes().startswith(superseded)
    assert steps_in(path) == list(range(9))


def test_a_clean_restart_puts_nothing_aside(workdir):
    first = JsonLines(workdir, 0)
    first.write({"step": 0, "loss": 1.0})
    first.close()
    assert JsonLines(workdir, 1).superseded == 0
    assert not (workdir / "metrics.superseded.jsonl").exists()


def test_a_line_that_lacks_only_its_newline_is_whole(workdir):
    path = workdir / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1}')
    lines = JsonLines(workdir, 2)
    lines.write({"step": 2})
    lines.close()
    assert lines.superseded == 0 and steps_in(path) == [0, 1, 2]


def test_every_line_is_there_before_close(workdir):
    lines = JsonLines(workdir, 0)
    for step in range(3):
        lines.write({"step": step})
        assert steps_in(workdir / "metrics.jsonl") == list(range(step + 1))


def test_reading_tells_a_torn_end_from_damage(workdir):
    path = workdir / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1, "lo')
    assert steps_in(path) == [0]
    path.write_bytes(b'{"step": 0}\n{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2, is not JSON"):
        read_metrics(path)


def test_a_bucket_gets_the_whole_file_when_it_must_last(workdir, monkeypatch):
    monkeypatch.setattr(writers.durable, "is_local", lambda path: False)
    now = [0.0]
    path = workdir / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    lines = LineFile(path, clock=lambda: now[0])
    lines.append('{"step": 1}')
    assert steps_in(path) == [0]
    lines.sync()
    assert steps_in(path) == [0, 1]
    now[0] = writers.REMOTE_SECONDS
    lines.append('{"step": 2}')
    assert steps_in(path) == [0, 1, 2]
    lines.append('{"step": 3}')
    lines.close()
    assert steps_in(path) == [0, 1, 2, 3]


def test_tensorboard_scalars_read_by_its_own_parser(workdir):
    board = TensorBoard(workdir, 0)
    board.write({"step": 3, "loss": 2.5, "mfu": None, "time": 10.0, "heldout_loss/wiki": 3.5})
    board.close()
    assert scalars(workdir) == {("loss", 3): 2.5, ("heldout_loss/wiki", 3): 3.5}


def test_tensorboard_is_told_which_steps_are_done_again(workdir):
    from tensorboardX.proto import event_pb2

    TensorBoard(workdir, 7).close()
    starts = [e.step for e in events_in(workdir) if e.session_log.status == event_pb2.SessionLog.START]
    assert starts == [7]


def events_in(workdir):
    from tensorboardX.proto import event_pb2

    for path in (workdir / "tensorboard").glob("events*"):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its crc, data, its crc
            (length,) = struct.unpack_from("<Q", data, at)
            yield event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4


def scalars(workdir):
    return {(v.tag, e.step): v.simple_value for e in events_in(workdir) for v in e.summary.value}


def test_wandb_missing(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed.  Try .venv/bin/pip install -e '.\[wandb\]'"):
        Wandb("phi", workdir, {})
    assert list(workdir.iterdir()) == []


def test_wandb_goes_on_in_the_same_run(workdir, monkeypatch):
    runs = []

    class Run:
        def __init__(self, **arguments):
            self.arguments, self.logged, self.finished = arguments, [], []
            runs.append(self)

        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, values):
            self.logged.append(values)

        def finish(self, exit_code):
            self.finished.append(exit_code)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **arguments: Run(**arguments)))
    for _ in range(2):
        writer = Wandb("phi", workdir, {"seed": 1})
        writer.write({"step": 4, "loss": 2.0, "mfu": None})
        writer.close()
    assert runs[0].arguments["id"] == runs[1].arguments["id"] and len(runs[0].arguments["id"]) == 12
    assert runs[0].arguments["project"] == "phi" and runs[0].arguments["config"] == {"seed": 1}
    assert runs[0].logged == [{"step": 4, "loss": 2.0}] and runs[0].finished == [0]
