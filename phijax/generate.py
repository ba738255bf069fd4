"""Text from a run: python -m phijax.generate --checkpoint=WORKDIR --prompt="Once upon"

First form, without a cache of keys and values: every token computes the window anew. Enough to look at a small model.
"""

import sys

from absl import flags

from phijax import command
from phijax.errors import EXIT_DONE, UserError
from phijax.parallel import hardware

FLAGS = flags.FlagValues()
flags.DEFINE_string("checkpoint", None, "Workdir of a run; its newest whole checkpoint is taken.", flag_values=FLAGS)
flags.DEFINE_string("prompt", "", "Text to continue; none: the start of a document.", flag_values=FLAGS)
flags.DEFINE_integer("max_tokens", 100, "At most this many tokens.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.", lower_bound=0.0, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "The same seed gives the same text.", flag_values=FLAGS)
flags.DEFINE_integer("window", 256, "Tokens that the model sees.", lower_bound=1, flag_values=FLAGS)


def main(arguments: list[str]) -> int:
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag. --help lists them.")
    if not FLAGS.checkpoint:
        raise UserError("Which run? --checkpoint=WORKDIR")
    hardware.prepare_cpu()
    import jax

    from phijax.checkpoint.trained import open_trained
    from phijax.inference.sampling import sample
    from phijax.model.backend import CHOICES, Backend
    from phijax.parallel.mesh import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model, params, tokenizer = open_trained(FLAGS.checkpoint, mesh)
    backend = CHOICES["cpu"] if jax.default_backend() == "cpu" else Backend(compute_dtype="bfloat16")
    # A text of the training data begins behind the end of another.
    prompt = [tokenizer.end_of_text, *tokenizer.encode(FLAGS.prompt)]
    ids = sample(
        model,
        params,
        backend,
        prompt,
        max_tokens=FLAGS.max_tokens,
        temperature=FLAGS.temperature,
        seed=FLAGS.seed,
        stop=tokenizer.end_of_text,
        window=min(FLAGS.window, model.max_position),
    )
    sys.stdout.write(tokenizer.decode([*prompt[1:], *ids]) + "\n")
    return EXIT_DONE


if __name__ == "__main__":
    command.run(main, FLAGS)
