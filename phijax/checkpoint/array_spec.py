"""Where one array lies in what Orbax writes, for readers that want a slice of it without Orbax."""

from typing import Any

from etils import epath

from phijax.storage import durable


def array_spec(state: epath.Path, path: str) -> dict[str, Any]:
    """How TensorStore finds one array of what Orbax writes: zarr inside an OCDBT database."""
    return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": durable.kvstore(state), "path": f"{path}/"}}
