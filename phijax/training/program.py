"""The compiled programs of a run: built once from the same numbers by training, dry run and the tests of the layout."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phijax.data import batch as batches
from phijax.errors import UserError
from phijax.model import params
from phijax.model.backend import Backend
from phijax.model.config import ModelConfig
from phijax.model.cross_entropy import LossConfig
from phijax.training.objectives import MakeObjective, Objective, next_token
from phijax.training.optimizer import Optimizer, OptimizerConfig, learning_rate, make_optimizer
from phijax.training.state import TrainState, new_state, place
from phijax.training.step import eval_step, train_step

BatchShape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides a train step, apart from mesh and batch shape."""

    model: ModelConfig
    backend: Backend
    optimizer: OptimizerConfig
    loss: LossConfig
    total_steps: int
    seed: int
    compiler_options: tuple[tuple[str, str | bool], ...] = ()  # (name, value), of parallel/hardware.py
    make_objective: MakeObjective = next_token

    @property
    def options(self) -> dict[str, str | bool] | None:
        """As jax.jit takes them."""
        return dict(self.compiler_options) or None

    def objective(self, length: int) -> Objective:
        return self.make_objective(self.model, self.backend, length=length, loss=self.loss)

    def make_optimizer(self) -> Optimizer:
        decayed = {path: leaf.decayed for path, leaf in params.leaves(self.model).items()}
        return make_optimizer(self.optimizer, params.nested(decayed), self.total_steps)


def abstract_state(recipe: Recipe, mesh: Mesh) -> TrainState:
    """The state as ShapeDtypeStructs with shardings; takes no memory."""
    optimizer = recipe.make_optimizer()
    shapes = jax.eval_shape(lambda: new_state(params.init(recipe.model, recipe.seed), optimizer))
    on_host = recipe.optimizer.moments_on_host
    whole = NamedSharding(mesh, PartitionSpec())
    return place(shapes, params.shardings(recipe.model, mesh), whole, moments_on_host=on_host)


def abstract_batch(recipe: Recipe, mesh: Mesh, shape: BatchShape) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch (A, B, T) of all that the objective reads; takes no memory."""
    return batches.abstract_batch(recipe.objective(shape[-1]).reads, shape, batches.batch_sharding(mesh))


def initial_state(recipe: Recipe, mesh: Mesh, start: Any = None) -> TrainState:
    """Step 0 on the mesh: each device makes its own part, the same numbers on any mesh.

    Args:
      start: parameters to begin with instead (already on the mesh); they are donated.
    """
    optimizer = recipe.make_optimizer()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(recipe, mesh))
    if start is not None:
        return jax.jit(lambda p: new_state(p, optimizer), out_shardings=shardings, donate_argnums=0)(start)
    make = jax.jit(lambda: new_state(params.init(recipe.model, recipe.seed), optimizer), out_shardings=shardings)
    return make()


def lower_train_step(recipe: Recipe, mesh: Mesh, shape: BatchShape) -> jax.stages.Lowered:
    """The train step for batches (A, B, T): (state, batch) -> (state, metrics by name). The state is donated."""
    optimizer = recipe.make_optimizer()
    step = functools.partial(
        train_step,
        objective=recipe.objective(shape[-1]),
        optimizer=optimizer,
        seed=recipe.seed,
        moments_on_host=recipe.optimizer.moments_on_host,
    )

    def program(state, batch):
        rate = learning_rate(recipe.optimizer, state.step, recipe.total_steps)
        state, metrics = step(state, batch)
        return state, {"learning_rate": rate, **metrics.by_name()}

    program.__name__ = program.__qualname__ = "train_step"
    state = abstract_state(recipe, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    with jax.set_mesh(mesh):
        jitted = jax.jit(program, donate_argnums=0, out_shardings=(shardings, None), compiler_options=recipe.options)
        return jitted.lower(state, abstract_batch(recipe, mesh, shape))


def compile_with_options(lowered: jax.stages.Lowered, recipe: Recipe) -> jax.stages.Compiled:
    """Raises: UserError where this compiler lacks an option of the recipe."""
    try:
        return lowered.compile()
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if recipe.compiler_options and "INVALID_ARGUMENT" in str(error):
            moments = " --config.optimizer.moments=device" if recipe.optimizer.moments_on_host else ""
            raise UserError(
                f"The compiler refuses an option of compiler.profile{' or optimizer.moments=host' if moments else ''}, "
                f"{recipe.options}: {str(error).splitlines()[0]}.  Try --config.compiler.profile=none{moments}"
            ) from error
        raise


def lower_eval_step(recipe: Recipe, mesh: Mesh, shape: BatchShape) -> jax.stages.Lowered:
    """(params, frozen, batch (1, B, T)) -> sums and counts (step.eval_step)."""
    state = abstract_state(recipe, mesh)
    step = functools.partial(eval_step, objective=recipe.objective(shape[-1]))
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, compiler_options=recipe.options)
        return jitted.lower(state.params, state.frozen, abstract_batch(recipe, mesh, shape))
