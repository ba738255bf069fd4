"""Where each formula of the model stands: once, and beside it only the kernels that compute it in another language."""

import pathlib
import re

import pytest

PHIJAX = pathlib.Path(__file__).parents[2] / "phijax"
KERNEL = "model/kernels/cpu_int4.py"  # says which of our formulas its C++ computes
HOMES = {
    "silu": (r"nn\.(silu|swish)\b|sigmoid", {"model/mlp.py", KERNEL}),
    "gelu": (r"nn\.gelu\b|\berf\(|tanh\(", {"model/mlp.py"}),
    "softmax scale": (
        r"head_dim ?\*\* ?-0\.5|shape\[-1\] ?\*\* ?-0\.5|sqrt\([^)]*head_dim",
        {"model/config.py", KERNEL},
    ),
    "rope table": (r"(jnp|np)\.(cos|sin)\((?!jnp\.pi)|theta ?\*\*", {"model/rope.py"}),
    "LongRoPE's factor": (r"log\(\w+\) / (math|np)\.log\(", {"model/rope.py"}),
    "norms": (r"rsqrt\(", {"model/norm.py"}),
    "silu in C++": (r"/ \(1(\.0f?|\.f)? \+ exponential\(", {"model/kernels/cpu_int4_tiles.h"}),
}


@pytest.mark.parametrize("formula", HOMES)
def test_a_formula_stands_in_its_home_alone(formula):
    pattern, homes = HOMES[formula]
    files = [file for end in ("py", "cc", "h") for file in PHIJAX.rglob(f"*.{end}")]
    found = {str(file.relative_to(PHIJAX)) for file in files if re.search(pattern, file.read_text())}
    assert found == homes
