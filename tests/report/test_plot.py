import json
import math
import random

import numpy as np
import pytest
from matplotlib import image

from phijax.report.plot import plot_losses, smoothed


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def curve(count=600):
    random.seed(1)
    for step in range(count):
        loss = 5.2 + 3.8 * math.exp(-step / 90) - 0.001 * step + random.gauss(0, 0.06)
        row = {"step": step, "loss": loss}
        if step % 100 == 50:
            row |= {"heldout_loss/reference": loss + 0.1, "heldout_loss/docstrings": loss + 0.35}
        yield row


def test_png_shows_curves_baselines_and_bad_steps(tmp_path):
    rows = list(curve())
    rows[300]["loss"] = "NaN"
    write(tmp_path / "metrics.jsonl", rows)
    png = tmp_path / "loss.png"
    plot_losses(tmp_path / "metrics.jsonl", png, {"uniform, ln 8192": math.log(8192), "unigram entropy": 6.8})
    assert png.read_bytes().startswith(b"\x89PNG")
    colours = {tuple(pixel) for pixel in (image.imread(png)[..., :3] * 255).round().astype(int).reshape(-1, 3)}
    for name, colour in dict(training=(9, 105, 218), held_out=(207, 34, 46), baseline=(140, 149, 159)).items():
        assert colour in colours, name


@pytest.mark.parametrize("rows", [[], [{"step": 0, "loss": "NaN"}], [{"step": 3, "loss": 2.0, "mfu": None}]])
def test_a_run_that_has_hardly_begun(tmp_path, rows):
    write(tmp_path / "metrics.jsonl", rows)
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert image.imread(tmp_path / "loss.png").shape[:2] == (780, 1350)


def test_smoothing_does_not_lag():
    line = [9.0 - 0.01 * step for step in range(100)]
    np.testing.assert_allclose(smoothed(line, 11)[:95], line[:95], rtol=1e-12)
    assert smoothed([1.0, 2.0, 6.0, 4.0], 3) == [1.0, 3.0, 4.0, 5.0]
    assert smoothed([1.0, 2.0, 4.0], 1) == [1.0, 2.0, 4.0]
