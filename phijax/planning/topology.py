"""TPU slices that are not here: the compiler alone, on a CPU machine."""

import os
import re

from phijax.errors import UserError

# The axis length from which a slice of this generation closes into a torus.
WRAPS_AT = {"v5p": 4, "v5e": 16, "v6e": 16}


def tpu_devices(topology: str) -> list:
    """Devices of a slice such as "v5e:16x16" or "v5p:4x4x8", to build a mesh and compile for. Nothing can run on them.

    Raises: UserError for a name that is no slice, or where libtpu is not installed.
    """
    match = re.fullmatch(r"(v\w+):(\d+(?:x\d+)+)", topology)
    if not match or match[1] not in WRAPS_AT:
        raise UserError(f"{topology!r} is no TPU slice. Examples: v5e:16x16, v5p:4x4x8, v6e:16x16.")
    lengths = [int(n) for n in match[2].split("x")]
    # The compiler must not look for the cloud's metadata, and must not mind a second process that compiles.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    # Without wrap a v5p slice has no torus links, and an all-gather over three axes becomes an all-reduce.
    wrap = [n % WRAPS_AT[match[1]] == 0 for n in lengths] + [False] * (3 - len(lengths))
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=1, wrap=tuple(wrap))
    except Exception as error:
        raise UserError(f"{topology}: the TPU compiler is not here ({error}). pip install 'phijax[tpu]'.") from error
    return list(described.devices)
