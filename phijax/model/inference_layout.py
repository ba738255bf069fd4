"""How a model is computed in inference, and how its weights and cache are laid out for that."""

import dataclasses

from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class InferenceLayout:
    """Static choices of an inference program.

    transposed: matrices that `project` contracts lie as [D, rows], the head too. On CPU the product with few rows is
      then 1.3 to 2 times as fast as over [rows, D], and, for two rows or more, the bits of a row depend neither on
      how many there are nor on its place (tests/inference/test_batches.py): a batch of one is computed as two.
    cut_by_time: the mesh over whose axis `tensor` the cache is cut by time.
    stacked: the cache is one stack, which the TPU's kernels read where it lies; needs layers that are scanned.
    cache_dtype: "int8", or "auto": that of computation.
    least_rows: what products are given, filled up with surplus rows. With one row XLA:CPU makes a loop that copies the
      matrix first; with fewer than eight the TPU leaves its matrix unit alone, and the vector unit takes ten times as
      long.
    mesh: of more than one chip, for kernels, which XLA does not cut.
    interpret: the kernels' bodies on any backend, for tests.
    """

    unrolled: bool
    transposed: bool = False
    dtype: str = "float32"
    rope_by_matmul: bool = False
    cut_by_time: Mesh | None = None
    stacked: bool = False
    cache_dtype: str = "auto"
    least_rows: int = 2
    mesh: Mesh | None = None
    interpret: bool = False
