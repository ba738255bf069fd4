"""Eight virtual CPU devices for every test; set before jax is imported."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

REPOSITORY = pathlib.Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"  # reference facts and small data of our own workshop; not part of the product


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of reference data; tests that want it skip, loudly, where it is missing."""
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not there: nothing to compare with")
    return SHARED
