"""A recipe's compiler options reach the compiler, of the train step and of the evaluation step."""

import dataclasses

import pytest
from small_training import LENGTH, mesh_of, recipe

from phijax.config import Config
from phijax.data.loader import DataConfig
from phijax.data.mixture import Phase, Source
from phijax.errors import UserError
from phijax.parallel.hardware import COMPILER_PROFILES, CompilerConfig, fills_memory
from phijax.run import recipe as recipes
from phijax.training import program
from phijax.training.optimizer import OptimizerConfig

SHAPE = (1, 8, LENGTH)


def with_options(**options):
    return dataclasses.replace(recipe(), compiler_options=tuple(options.items()))


@pytest.mark.parametrize(
    ("moments", "remedy"), [("device", "profile=none$"), ("host", r"profile=none --config\.optimizer\.moments=device$")]
)
def test_what_asked_for_a_refused_option_is_named(moments, remedy):
    """With moments on the host TPUs get options without any profile."""
    asked = with_options(xla_no_such_option="true")
    asked = dataclasses.replace(asked, optimizer=dataclasses.replace(asked.optimizer, moments=moments))
    lowered = program.lower_eval_step(asked, mesh_of(1, 1, 1, 1), SHAPE)
    with pytest.raises(UserError, match=remedy):
        program.compile_with_options(lowered, asked)


@pytest.mark.parametrize("lower", [program.lower_train_step, program.lower_eval_step])
def test_an_option_that_this_compiler_lacks_is_one_message(lower):
    asked = with_options(xla_backend_optimization_level="0", xla_no_such_option="true")
    lowered = lower(asked, mesh_of(1, 1, 1, 1), SHAPE)
    with pytest.raises(UserError, match=r"refuses an option of compiler\.profile.*xla_no_such_option"):
        program.compile_with_options(lowered, asked)


def test_an_option_changes_the_compiled_program():
    """At level 0 LLVM vectorises nothing, so the same step is compiled to other code."""
    mesh = mesh_of(1, 1, 1, 1)
    texts = []
    for asked in (with_options(xla_backend_optimization_level="0"), with_options(xla_cpu_enable_fast_math=True)):
        lowered = program.lower_eval_step(asked, mesh, SHAPE)
        compiled = program.compile_with_options(lowered, asked)
        texts.append(compiled.runtime_executable().serialize())
    assert texts[0] != texts[1]


def test_the_config_names_the_profile_of_the_recipe():
    tiny = Phase(steps=4000, sequence_length=1024, global_batch_size=8, mixture=(Source("shards"),))
    config = Config(compiler=CompilerConfig("sparse_core"), data=DataConfig(phases=(tiny,)))
    sizes = dict(data=1, fsdp=1, context=1, tensor=1)
    made = recipes.make_recipe(config, sizes, "tpu", "v5p")
    assert dict(made.compiler_options) == COMPILER_PROFILES["v5p"]["sparse_core"] == made.options
    on_host = dataclasses.replace(config, optimizer=OptimizerConfig(moments="host"))
    assert fills_memory(recipes.make_recipe(on_host, sizes, "tpu", "v5p").options) and not fills_memory(made.options)
    with pytest.raises(UserError, match="is not one of this device"):
        recipes.make_recipe(config, sizes, "cpu", None)
