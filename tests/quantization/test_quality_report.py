"""The figures of quality against torch, the table of sizes, the plot."""

import struct

import numpy as np
import pytest
from references.quantized import MODEL, SCHEME

from phijax.model import params
from phijax.quantization import policy, report


def random_logits(seed: int, shape=(150, 97)) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def test_kl_and_losses_equal_torchs():
    torch = pytest.importorskip("torch")
    p, q = random_logits(0), random_logits(1)
    targets = np.random.default_rng(2).integers(0, 97, 150)
    ours = report.compare(p, q, targets)
    wide = [torch.tensor(logits, dtype=torch.float64) for logits in (p, q)]
    theirs = [torch.log_softmax(logits, -1) for logits in wide]
    kl = torch.nn.functional.kl_div(theirs[1], theirs[0], log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(ours.kl, kl, rtol=1e-10)
    for loss, logits in ((ours.loss_float, wide[0]), (ours.loss_quantized, wide[1])):
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none")
        np.testing.assert_allclose(loss, expected, rtol=1e-10)
    np.testing.assert_array_equal(ours.agrees, p.argmax(-1) == q.argmax(-1))


def test_measure_sums_up_rows_of_two_models():
    """One after the other: the second is not opened before the first has given all its logits."""
    rows = [np.arange(n + 1) % 97 for n in (20, 33)]
    log = []

    def load(name: str, seed: int):
        log.append(f"load {name}")

        def logits(ids):
            log.append(name)
            return random_logits(seed + len(ids), (len(ids), 97))

        return lambda: logits

    quality = report.measure(rows, lambda: load("float", 0)(), lambda: load("small", 100)())
    assert log == ["load float", "float", "float", "load small", "small", "small"]
    parts = [report.compare(random_logits(n, (n, 97)), random_logits(100 + n, (n, 97)), row[1:]) for n, row in zip((20, 33), rows, strict=True)]  # fmt: skip # noqa: E501
    kl = np.concatenate([part.kl for part in parts])
    assert quality.tokens == 53 and quality.kl_mean == pytest.approx(kl.mean())
    assert quality.kl_99th_percentile == pytest.approx(np.percentile(kl, 99))
    mean = np.concatenate([part.loss_quantized for part in parts]).mean()
    assert quality.perplexity_quantized == pytest.approx(np.exp(mean))
    assert quality.top1_agreement == pytest.approx(np.concatenate([part.agrees for part in parts]).mean())


def test_a_model_has_no_distance_from_itself():
    logits = random_logits(3)
    same = report.summarise([report.compare(logits, logits, np.zeros(150, int))])
    assert same.kl_mean == same.kl_99th_percentile == 0.0 and same.top1_agreement == 1.0
    assert same.perplexity_float == same.perplexity_quantized


def test_the_table_has_bits_and_bytes_of_each_kind():
    assigned = policy.assign(MODEL, policy.parse(SCHEME))
    shapes = params.shapes(MODEL)
    nbytes = {
        path: assigned[path].nbytes(shape, policy.summed_axis(path)) if path in assigned else 4 * int(np.prod(shape))
        for path, shape in shapes.items()
    }
    rows = {line.split()[0]: line.split()[1:] for line in report.size_table(shapes, assigned, nbytes)}
    assert rows["gate_up"][:3] == ["int4_g32", f"{4 * 96 * 64:,}", "4.500"]
    assert rows["o"][:3] == ["int8", f"{2 * 48 * 64:,}", f"{8 + 16 / 48:.3f}"]
    assert rows["others"][:4] == ["as", "stored", f"{5 * 64}", "32.000"]
    assert rows["all"][0] == f"{params.count(MODEL) + 2 * 324 * 64:,}"


def test_the_plot_is_a_picture(tmp_path):
    report.plot_errors({"blocks/mlp/gate": [0.1, 0.2], "blocks/mlp/up": [0.1, 0.1], "head": [0.05]}, tmp_path / "p.png")
    data = (tmp_path / "p.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (1350, 780)
