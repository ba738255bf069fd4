"""The sharding table: what it refuses, what it warns of, what it gives."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from phijax.errors import UserError
from phijax.model import params
from phijax.model.presets import PRESETS
from phijax.parallel import sharding
from phijax.parallel.mesh import MeshConfig, make_mesh


def sizes(data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> dict[str, int]:
    return {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}


def test_specs():
    assert sharding.spec(("vocab", "embed")) == PartitionSpec(("tensor", "fsdp"), None)
    assert sharding.spec(("layers", "kv_heads", "embed")) == PartitionSpec(None, ("tensor", "fsdp"), None)
    assert sharding.spec(("act_batch", "act_heads", "act_time", None)) == PartitionSpec(
        ("data", "fsdp"), "tensor", "context", None
    )
    # In use a weight is whole over fsdp, and still cut at heads by tensor.
    assert sharding.spec(("ffn", "embed"), gathered=True) == PartitionSpec("tensor", None)
    assert sharding.parts("ffn", sizes(4, 8, 1, 2)) == 16
    assert sharding.parts("ffn", sizes(4, 8, 1, 2), gathered=True) == 2
    assert sharding.parts("act_batch", sizes(4, 8, 1, 2)) == 32
    assert sharding.parts("embed", sizes(4, 8, 1, 2)) == 1


def test_unknown_axis_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"logical axis 'head' of \('head', 'embed'\).*Nearest: 'heads'"):
        sharding.spec(("head", "embed"))
    with pytest.raises(UserError) as error:
        sharding.spec(("zzzzzz",))
    assert "Nearest" not in str(error.value)


@pytest.mark.parametrize("axes", [("heads", "ffn"), ("vocab", "vocab"), ("act_batch", "heads"), ("act_heads", "ffn")])
def test_mesh_axis_used_twice_is_refused(axes):
    with pytest.raises(UserError, match=rf"mesh axis '(tensor|fsdp)' is used twice.*by '{axes[0]}' and by '{axes[1]}'"):
        sharding.spec(axes)


def test_indivisible_array_is_refused_with_sizes():
    with pytest.raises(UserError) as error:
        sharding.check_divides("blocks/mlp/up", (40, 90, 64), ("layers", "ffn", "embed"), sizes(fsdp=8, tensor=2))
    message = str(error.value)
    for part in ("blocks/mlp/up", "'ffn'", "90", "16 chips", "'fsdp': 8", "'tensor': 2", "Nearest that divides: 15"):
        assert part in message
    sharding.check_divides("blocks/mlp/up", (40, 96, 63), ("layers", "ffn", "embed"), sizes(data=3, fsdp=8, tensor=2))


def test_dimensions_without_axes_are_refused():
    with pytest.raises(UserError, match=r"a/b: 3 dimensions \(2, 3, 4\) but 2 logical axes"):
        sharding.check_divides("a/b", (2, 3, 4), ("ffn", "embed"), sizes())


def test_constrain_places_and_leaves_alone_without_a_mesh():
    x = np.arange(64.0).reshape(8, 8)
    assert sharding.constrain(x, ("act_batch", "act_embed")) is x
    assert sharding.mesh_sizes() == sizes()
    mesh = make_mesh(MeshConfig(2, 2, 1, 2), jax.devices())
    with jax.set_mesh(mesh):
        assert sharding.mesh_sizes() == sizes(2, 2, 1, 2)
        placed = jax.jit(lambda x: sharding.constrain(x * 1, ("ffn", "embed")))(x)
        used = jax.jit(lambda x: sharding.constrain(x * 1, ("ffn", "embed"), gathered=True))(x)
    assert placed.sharding.is_equivalent_to(sharding.sharding(mesh, ("ffn", "embed")), 2)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 8)}
    assert {shard.data.shape for shard in used.addressable_shards} == {(4, 8)}
    np.testing.assert_array_equal(placed, x)


# --- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor", [4, 8, 3])
def test_kv_heads_that_tensor_does_not_divide_are_refused(tensor):
    """Medium has 10 kv heads for 40 heads."""
    with pytest.raises(UserError) as error:
        params.check_mesh(PRESETS["phi3_medium"], sizes(fsdp=8, tensor=tensor))
    message = str(error.value)
    assert f"mesh.tensor={tensor}" in message and "num_kv_heads=10" in message
    assert "Sizes that do: 1, 2, 5, 10." in message
    assert message.endswith("Of them, the 32768 rows of the vocabulary allow: 1, 2.")


def test_the_sizes_named_are_accepted():
    for tensor in (1, 2):
        params.check_mesh(PRESETS["phi3_medium"], sizes(fsdp=2, tensor=tensor))
    for tensor in (5, 10):  # they cut the heads, and the vocabulary says no
        with pytest.raises(UserError, match=r"axis 'vocab' has length 32768"):
            params.check_mesh(PRESETS["phi3_medium"], sizes(tensor=tensor))


def test_sizes_that_fit_everything_are_named_once():
    with pytest.raises(UserError) as error:
        params.check_mesh(PRESETS["phi3_mini"], sizes(tensor=3))
    assert str(error.value).endswith("Sizes that do: 1, 2, 4, 8, 16, 32.")


def test_a_mesh_that_does_not_cut_the_model_is_refused():
    with pytest.raises(UserError, match=r"has length 3072, which cannot be split over 36 chips"):
        params.check_mesh(PRESETS["phi3_mini"], sizes(fsdp=36))


def test_ragged_rows_are_warned_of_with_the_nearest_mesh():
    """17920 / 128 = 140 rows a chip, 5120 / 128 = 40; 64 leaves 280 and 80."""
    (warning,) = params.check_mesh(PRESETS["phi3_medium"], sizes(data=2, fsdp=128))
    assert "140 rows of blocks/mlp/" in warning
    assert "fsdp=64" in warning and "3 weights" in warning
    # What it names is free of it.
    assert params.check_mesh(PRESETS["phi3_medium"], sizes(data=4, fsdp=64)) == []


@pytest.mark.parametrize(
    "preset, mesh",
    [
        ("phi3_mini", sizes(data=2, fsdp=128)),
        ("phi3_medium", sizes(fsdp=64)),
        ("phi3_medium", sizes(fsdp=32, tensor=2)),
        ("llama2_7b", sizes(fsdp=32)),
        ("tiny", sizes(data=8)),
    ],
)
def test_even_rows_are_not_warned_of(preset, mesh):
    assert params.check_mesh(PRESETS[preset], mesh) == []


def test_tensor_counts_in_the_rows():
    (warning,) = params.check_mesh(PRESETS["phi3_medium"], sizes(fsdp=64, tensor=2))
    assert "140 rows" in warning and "fsdp=32" in warning
