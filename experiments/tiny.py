"""A phi-3 of 2.4M parameters on a laptop: python -m phijax.main --config=experiments/tiny.py --workdir=build/tiny

Reads what `make demo` prepares: the text that every Python carries. A minute and a half on two cores.
"""

import phijax.config


def get_config():
    c = phijax.config.defaults()
    c.model.preset = "tiny"
    c.data.phases = [
        dict(
            steps=200,
            sequence_length=256,
            global_batch_size=8,
            mixture=[dict(path="build/python_text/train", weight=1)],
        )
    ]
    c.optimizer.learning_rate = 4e-3
    c.optimizer.warmup_steps = 20
    c.checkpoint.every_steps = 50
    c.evaluation.every_steps = 50
    c.evaluation.sets = [dict(name="python_text", path="build/python_text/validation")]
    c.evaluation.max_rows = 64
    return c
