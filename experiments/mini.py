"""phi-3-mini on one v5e-256: python -m phijax.main --config=experiments/mini.py --workdir=gs://bucket/mini

Two phases, as the paper describes: web text, then filtered web and synthetic text while the rate decays.
"""

import phijax.config


def get_config():
    c = phijax.config.defaults()
    c.model.preset = "phi3_mini"
    c.model.sliding_window = None  # full attention: nothing is gained by a window at 4096
    c.mesh = dict(data=2, fsdp=128)  # 256 chips; 128 keeps 24 rows of every attention weight on a chip
    c.data.phases = [
        dict(
            steps=600_000,
            sequence_length=4096,
            global_batch_size=1024,
            mixture=[dict(path="shards/web/train", weight=1)],
        ),
        dict(
            steps=200_000,
            sequence_length=4096,
            global_batch_size=1024,
            mixture=[dict(path="shards/web/train", weight=3), dict(path="shards/synthetic", weight=7)],
        ),
    ]
    c.data.micro_batches = 4  # 1 sequence a chip at a time: everything can be saved for the backward pass
    c.optimizer.schedule = "wsd"
    c.optimizer.decay_fraction = 0.25
    c.optimizer.final_fraction = 0.0
    c.loss.z_loss = 1e-4
    c.checkpoint.keep_every = 20_000
    c.evaluation.sets = [dict(name="web", path="shards/web/validation")]
    c.evaluation.max_rows = 1024
    return c
