"""Save and restore: every bit, every mesh; what is refused; which steps are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_case import IDENTITY, bits, like, mesh_of, rows, save_steps, state, writer

from phijax.checkpoint import host_memory, reading
from phijax.checkpoint.config import CheckpointConfig
from phijax.errors import UserError


@pytest.mark.parametrize("asynchronous", [True, False])
def test_restores_every_bit_on_any_mesh(tmp_path, asynchronous):
    saved = state(1, mesh_of(8))
    with writer(tmp_path, asynchronous=asynchronous) as (checkpoints, lines):
        assert checkpoints.latest_verified() is None
        checkpoints.save(3, saved, {"rows": 96})
        checkpoints.wait()
        assert any(line.startswith("saved step 3") for line in lines)
    with writer(tmp_path) as (checkpoints, lines):
        assert checkpoints.latest_verified() == 3
        assert lines == []
        assert checkpoints.manifest(3)["identity"] == IDENTITY
        assert checkpoints.manifest(3)["extra"] == {"rows": 96}
        for mesh in (mesh_of(8), mesh_of(4, 2), mesh_of(2), mesh_of(1)):
            wanted = like(saved, mesh)
            restored = checkpoints.restore(3, wanted)
            assert bits(restored) == bits(saved)
            assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, wanted))


def test_chain_of_meshes_keeps_every_bit(tmp_path):
    tree = first = state(2, mesh_of(8))
    for step, mesh in enumerate((mesh_of(4, 2), mesh_of(1), mesh_of(2, 4))):
        with writer(tmp_path) as (checkpoints, _):
            checkpoints.save(step, tree)
            checkpoints.wait()
            tree = checkpoints.restore(step, like(first, mesh))
    assert bits(tree) == bits(first)


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    # CPU arrays become numpy without a copy: were the save to read them later, the next step would overwrite them.
    mesh = mesh_of(8)
    tree = {"w": jax.device_put(jnp.arange(2**20, dtype=jnp.float32).reshape(8, -1), rows(mesh))}
    step = jax.jit(lambda t: jax.tree.map(lambda x: x * 1.5 + 1, t), donate_argnums=0)
    tree = step(tree)
    before = bits(tree)
    wanted = like(tree)
    with writer(tmp_path) as (checkpoints, _):
        checkpoints.save(1, tree)
        for _ in range(20):
            tree = step(tree)
        jax.block_until_ready(tree)
        checkpoints.wait()
        assert bits(checkpoints.restore(1, wanted)) == before


def test_saved_is_said_only_after_the_manifest(tmp_path):
    with writer(tmp_path) as (checkpoints, lines):
        checkpoints.save(1, state(1, mesh_of(8)))
        while not lines:
            assert not any("saved" in line for line in lines)
            checkpoints.poll()
        assert lines[0].startswith("saved step 1")
        assert checkpoints.steps() == [1]
        checkpoints.poll()
        assert len(lines) == 1


def test_step_saved_already_and_older_step_are_errors(tmp_path):
    mesh = mesh_of(8)
    save_steps(tmp_path, {2: 1, 4: 1}, mesh)
    with writer(tmp_path) as (checkpoints, _):
        with pytest.raises(UserError, match=r"Step 4 is saved in .* already"):
            checkpoints.save(4, state(2, mesh))
        with pytest.raises(UserError, match=r"Step 3 cannot be saved.*newer steps are there \(\[4\]\)"):
            checkpoints.save(3, state(2, mesh))
        assert bits(checkpoints.restore(4, like(state(1, mesh)))) == bits(state(1, mesh))
        checkpoints.save(4, state(2, mesh), overwrite=True)
        checkpoints.wait()
        assert bits(checkpoints.restore(4, like(state(1, mesh)))) == bits(state(2, mesh))


def test_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_steps("runs/checkpoints", {1: 0}, mesh_of(1))
    restored = reading.restore_arrays("runs/checkpoints/1", like(state(0, mesh_of(1))))
    assert bits(restored) == bits(state(0, mesh_of(1)))


def test_keep_policy(tmp_path):
    save_steps(tmp_path, dict.fromkeys(range(1, 8), 0), mesh_of(1), keep_last=2, keep_every=3)
    with writer(tmp_path) as (checkpoints, _):
        assert checkpoints.steps() == [3, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "6", "7"]  # no lock, no remains


def test_other_shape_dtype_and_paths_are_refused_by_name(tmp_path):
    mesh = mesh_of(8)
    save_steps(tmp_path, {1: 0}, mesh)
    wanted = like(state(0, mesh))
    wanted["params"]["w"] = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=rows(mesh))
    wanted["params"]["half"] = jax.ShapeDtypeStruct((2, 8, 3), jnp.float32, sharding=rows(mesh_of(2)))
    wanted["params"]["new"] = wanted["params"].pop("norm")
    with writer(tmp_path) as (checkpoints, _), pytest.raises(UserError) as error:
        checkpoints.restore(1, wanted)
    for line in (
        "4 differences, of 9 arrays",
        "params/w: float32 (16, 24) in the checkpoint, float32 (16, 32) wanted",
        "params/half: bfloat16 (2, 8, 3) in the checkpoint, float32 (2, 8, 3) wanted",
        "params/new: not in the checkpoint",
        "params/norm: only in the checkpoint",
    ):
        assert line in str(error.value)


def test_part_of_a_checkpoint_is_read_only_when_asked(tmp_path):
    mesh = mesh_of(8)
    saved = state(5, mesh)
    save_steps(tmp_path, {1: 5}, mesh)
    wanted = {"params": like(saved["params"], mesh_of(1))}
    with pytest.raises(UserError, match="only in the checkpoint"):
        reading.restore_arrays(tmp_path / "1", wanted)
    assert bits(reading.restore_arrays(tmp_path / "1", wanted, partial=True)["params"]) == bits(saved["params"])


def test_what_is_no_array_is_refused(tmp_path):
    with writer(tmp_path) as (checkpoints, _):
        for leaf in (1.0, np.zeros(3), jax.random.key(0)):
            with pytest.raises(TypeError, match="a/b"):
                checkpoints.save(1, {"a": {"b": leaf}})
        with pytest.raises(TypeError, match="one path"):
            checkpoints.save(1, {"a/b": jnp.zeros(2), "a": {"b": jnp.zeros(2)}})
        assert checkpoints.steps() == []


def test_describe_names_what_a_directory_holds(tmp_path):
    save_steps(tmp_path, {1: 0, 2: 0}, mesh_of(1))
    (tmp_path / "notes").mkdir()
    text = reading.describe(tmp_path)
    assert "step 1" in text and "step 2" in text and "notes: not a checkpoint of ours" in text
    assert 'identity.tokenizer: "abc"' in text and "9 arrays" in text
    assert reading.describe(tmp_path / "2").startswith(f"{tmp_path / '2'}: step 2")
    with pytest.raises(UserError, match="holds no checkpoint"):
        reading.describe(tmp_path / "notes")


def test_host_memory_counts_each_piece_of_this_process_once():
    tree = {"rows": jnp.zeros((8, 4), jnp.float32), "scalar": jnp.zeros((), jnp.bfloat16)}
    tree["rows"] = jax.device_put(tree["rows"], rows(mesh_of(4, 2)))
    everywhere = jax.device_put(jnp.zeros((8, 4), jnp.int8), jax.sharding.NamedSharding(mesh_of(8), jax.P()))
    assert host_memory.bytes_held_by_save(tree, asynchronous=True) == 8 * 4 * 4 + 2
    assert host_memory.bytes_held_by_save({"x": everywhere}, asynchronous=True) == 32
    huge = [jax.ShapeDtypeStruct((10**10,), jnp.int8, sharding=rows(mesh_of(8)))] * 3
    assert host_memory.bytes_held_by_save(huge, asynchronous=True) == 3 * 10**10
    assert host_memory.bytes_held_by_save(huge, asynchronous=False) == 10**10


def test_host_memory_too_small_is_an_error_and_scarce_is_a_warning():
    tree = [jax.ShapeDtypeStruct((10**9,), jnp.int8, sharding=rows(mesh_of(8)))]
    assert host_memory.check(tree, asynchronous=True, available=10 * 10**9) is None
    assert host_memory.check(tree, asynchronous=True, available=None) is None
    assert "1.0 GB of host memory" in host_memory.check(tree, asynchronous=True, available=11 * 10**8)
    with pytest.raises(UserError, match=r"needs 1\.0 GB .* 0\.9 GB are free.\nSay .*asynchronous=False"):
        host_memory.check(tree, asynchronous=True, available=9 * 10**8)


def test_moments_that_will_lie_on_the_host_are_counted_and_those_that_do_are_not():
    sharding = rows(mesh_of(8)).with_memory_kind("pinned_host")
    to_be = [jax.ShapeDtypeStruct((10**9,), jnp.int8, sharding=sharding)]
    assert host_memory.bytes_on_host(to_be) == 10**9
    with pytest.raises(UserError, match=r"needs 2\.0 GB .*, 1\.0 of them for the optimizer's moments .*; 1\.9 GB are"):
        host_memory.check(to_be, asynchronous=True, available=19 * 10**8)
    replicas = jax.sharding.NamedSharding(mesh_of(4, 2), jax.P("fsdp"), memory_kind="pinned_host")
    assert host_memory.bytes_on_host([jax.ShapeDtypeStruct((8, 10), jnp.int8, sharding=replicas)]) == 2 * 80
    there = [jax.device_put(jnp.zeros((8, 4)), sharding)]
    assert host_memory.bytes_on_host(there) == 0
    assert host_memory.check(there, asynchronous=True, available=10**4) is None


def test_first_save_asks_for_host_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 100)
    with writer(tmp_path) as (checkpoints, _):
        with pytest.raises(UserError, match="host memory"):
            checkpoints.save(1, state(0, mesh_of(8)))
        assert checkpoints.steps() == []


@pytest.mark.parametrize(
    "values",
    [{"keep_last": 0}, {"every_steps": 0}, {"keep_every": 0}, {"timeout_seconds": 0}, {"on_save_failure": "ignore"}],
)
def test_config_refuses_what_makes_no_sense(values):
    with pytest.raises(UserError, match=f"checkpoint.{next(iter(values))}="):
        CheckpointConfig(**values)
