"""Global arrays from rows: the same on every mesh, and each process asked for the rows of its own devices."""

import itertools
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from phijax.data import batch
from phijax.errors import UserError
from phijax.parallel.sharding import MESH_AXES

# data, fsdp, context, tensor
MESHES = [
    (8, 1, 1, 1),
    (1, 8, 1, 1),
    (1, 2, 2, 2),
    (1, 1, 1, 8),
    (1, 1, 8, 1),
    (2, 2, 2, 1),
]  # data fsdp context tensor
LENGTH, ROWS = 16, 16
KEYS = batch.TEXT_KEYS | {"teacher": batch.BatchKey(np.float16, (3, 2), padding=-1)}


def mesh_of(shape):
    return Mesh(np.array(jax.devices()).reshape(shape), MESH_AXES)


def some_rows(count=ROWS):
    draw = np.random.default_rng(0)
    return {
        i: {n: draw.integers(0, 99, (LENGTH, *k.axes)).astype(k.dtype) for n, k in KEYS.items()} for i in range(count)
    }


class OneProcess:
    """A sharding as a process sees it that has only some of the mesh's devices."""

    def __init__(self, placed, devices):
        self._placed, self._devices = placed, set(devices)

    def addressable_devices_indices_map(self, shape):
        return {d: index for d, index in self._placed.devices_indices_map(shape).items() if d in self._devices}


def processes(mesh, count):
    """The devices of each of `count` processes: neighbours in id order, as hosts have them."""
    return np.array_split(mesh.devices.flatten(), count)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_arrays_are_the_rows_in_order_on_every_mesh(micro_batches):
    rows = some_rows()
    shape = batch.batch_shape(ROWS, micro_batches, LENGTH)
    assert shape == (micro_batches, ROWS // micro_batches, LENGTH)
    for sizes in MESHES:
        arrays = batch.assemble(KEYS, shape, batch.batch_sharding(mesh_of(sizes)), rows)
        assert set(arrays) == set(KEYS)
        for name, array in arrays.items():
            assert array.shape == (*shape, *KEYS[name].axes) and array.dtype == KEYS[name].dtype
            values = np.asarray(array)
            for i in range(ROWS):
                a, b = divmod(i, ROWS // micro_batches)
                np.testing.assert_array_equal(values[a, b], rows[i][name])


def test_rows_lie_over_data_and_fsdp_and_time_over_context():
    for sizes in MESHES:
        data, fsdp, context, _ = sizes
        arrays = batch.assemble(KEYS, (2, 8, LENGTH), batch.batch_sharding(mesh_of(sizes)), some_rows())
        for name, axes in (("tokens", ()), ("teacher", (3, 2))):
            shapes = {s.data.shape for s in arrays[name].addressable_shards}
            assert shapes == {(2, 8 // (data * fsdp), LENGTH // context, *axes)}


def test_the_abstract_batch_is_that_of_a_real_one():
    placed = batch.batch_sharding(mesh_of((1, 2, 2, 2)))
    real, abstract = (
        batch.assemble(KEYS, (2, 8, LENGTH), placed, some_rows()),
        batch.abstract_batch(KEYS, (2, 8, LENGTH), placed),
    )
    assert {n: (a.shape, a.dtype, a.sharding) for n, a in real.items()} == {
        n: (a.shape, a.dtype, a.sharding) for n, a in abstract.items()
    }


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        # 16 rows as 2 micro-batches of 8: row i of a micro-batch lies on device i of data x fsdp = 8.
        ((8, 1, 1, 1), 2, [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]),
        ((1, 8, 1, 1), 4, [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]),
        ((1, 1, 1, 8), 2, [list(range(16))] * 2),  # tensor spans the processes: both need every row
        ((1, 1, 8, 1), 4, [list(range(16))] * 4),  # so with context: of each row they slice their part
        ((1, 2, 2, 2), 2, [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]),
        ((1, 2, 2, 2), 4, [[0, 1, 2, 3, 8, 9, 10, 11]] * 2 + [[4, 5, 6, 7, 12, 13, 14, 15]] * 2),
        ((2, 2, 2, 1), 8, [[0, 1, 8, 9]] * 2 + [[2, 3, 10, 11]] * 2 + [[4, 5, 12, 13]] * 2 + [[6, 7, 14, 15]] * 2),
    ],
)
def test_rows_that_a_process_needs(sizes, count, expected):
    mesh = mesh_of(sizes)
    placed = batch.batch_sharding(mesh)
    needed = [batch.local_rows((2, 8, LENGTH), OneProcess(placed, devices)) for devices in processes(mesh, count)]
    assert needed == expected


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_process_needs_no_other_rows(count, monkeypatch):
    """Each process's own part of every array, made from its `local_rows` alone, is that part of the global array."""
    rows, shape = some_rows(), (2, 8, LENGTH)
    for sizes in MESHES:
        mesh = mesh_of(sizes)
        placed = batch.batch_sharding(mesh)
        whole = batch.assemble(KEYS, shape, placed, rows)
        parts = {}
        for devices in processes(mesh, count):
            mine = OneProcess(placed, devices)
            local = {i: rows[i] for i in batch.local_rows(shape, mine)}
            with monkeypatch.context() as patch:
                patch.setattr(
                    jax,
                    "make_array_from_callback",
                    lambda shape, mine, values, dtype: {
                        device: values(index) for device, index in mine.addressable_devices_indices_map(shape).items()
                    },
                )
                parts |= {
                    (n, d): v for n, per in batch.assemble(KEYS, shape, mine, local).items() for d, v in per.items()
                }
        for name, array in whole.items():
            assert len(array.addressable_shards) == 8
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(parts[name, shard.device], shard.data)


@pytest.mark.parametrize(
    ("rows", "micro_batches", "nearest", "paste"),
    [(1000, 1, "896 or 1024", 1024), (1000, 2, "768 or 1024", 1024), (100, 1, "128", 128), (129, 1, "128 or 256", 256)],
)
def test_an_indivisible_batch_is_refused_with_the_nearest_that_can(rows, micro_batches, nearest, paste):
    sizes = dict(data=2, fsdp=64, context=1, tensor=4)
    with pytest.raises(UserError) as error:
        batch.check_batch("data.phases[0]", rows, micro_batches, 4096, sizes)
    assert str(error.value) == (
        f"data.phases[0].global_batch_size={rows} cannot be split over {micro_batches} micro-batches x data x fsdp = "
        f"{micro_batches} x 2 x 64.\n"
        f"Nearest that can: {nearest}.  Try --config.data.phases[0].global_batch_size={paste}"
    )
    for size in re.findall(r"\d+", nearest):
        batch.check_batch("data.phases[0]", int(size), micro_batches, 4096, sizes)


def test_a_length_that_context_does_not_cut_is_refused():
    sizes = dict(data=1, fsdp=1, context=3, tensor=1)
    batch.check_batch("evaluation", 1, 1, 33, sizes)
    with pytest.raises(UserError, match=r"evaluation.sequence_length=32 .* mesh.context=3.\nTry --config\S*length=33$"):
        batch.check_batch("evaluation", 1, 1, 32, sizes)


def test_the_message_names_the_key_of_its_section():
    with pytest.raises(UserError, match=r"evaluation.batch_size=3 .*\n.*--config.evaluation.batch_size=4"):
        batch.check_batch("evaluation", 3, 1, 8, dict(data=2, fsdp=2, context=1, tensor=1), size_key="batch_size")


def test_every_size_that_is_accepted_can_be_assembled():
    """What check_batch lets through is what jax can place, and only that."""
    for rows, micro, sizes in itertools.product((1, 2, 6, 8, 16), (1, 2), MESHES[:4]):
        named = dict(zip(MESH_AXES, sizes, strict=True))
        try:
            batch.check_batch("data.phases[0]", rows, micro, LENGTH, named)
        except UserError:
            assert rows % micro or (rows // micro) % (named["data"] * named["fsdp"])
            continue
        shape = batch.batch_shape(rows, micro, LENGTH)
        batch.assemble(KEYS, shape, batch.batch_sharding(mesh_of(sizes)), some_rows(rows))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, r"A row has nothing as 'teacher'; the objective reads float16 \(16, 3, 2\)"),
        ({"pair": np.zeros(16, np.int32)}, r"A row has int32 \(16,\) as 'pair'; the objective reads nothing"),
        ({"teacher": np.zeros((16, 4, 2), np.float16)}, r"float16 \(16, 4, 2\) as 'teacher'"),
        ({"weights": np.zeros(16, np.float64)}, r"float64 \(16,\) as 'weights'; the objective reads float32"),
        ({"tokens": np.zeros(15, np.int32)}, r"int32 \(15,\) as 'tokens'"),
    ],
    ids=["lacking", "too many", "axes", "dtype", "length"],
)
def test_a_row_that_the_objective_cannot_read_is_refused_not_cast(changes, message):
    rows = some_rows()
    rows[5] = {name: array for name, array in (rows[5] | changes).items() if array is not None}
    with pytest.raises(UserError, match=message):
        batch.assemble(KEYS, (2, 8, LENGTH), batch.batch_sharding(mesh_of((8, 1, 1, 1))), rows)


def test_a_padding_row_has_all_that_the_objective_reads():
    padding = batch.padding_row(KEYS, LENGTH)
    batch.check_row(padding, KEYS, LENGTH)
    assert (padding.pop("teacher") == -1).all() and not any(array.any() for array in padding.values())
