import pytest
from cloud_case import Cloud


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path / "cloud")
