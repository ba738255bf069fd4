"""phi-3-medium on one v5p-128: python -m phijax.main --config=experiments/medium.py --workdir=gs://bucket/medium

Two phases, as the paper describes: web text, then filtered web and synthetic text while the rate decays; 4.8 T tokens
in all. Shards come from `phijax.prepare`; change the paths, or copy the folders to every host.
"""

import phijax.config


def get_config():
    c = phijax.config.defaults()
    c.model.preset = "phi3_medium"
    c.model.sliding_window = None  # full attention: nothing is gained by a window at 4096
    c.mesh = dict(data=2, fsdp=64)  # 128 chips; 64 keeps 8 rows of every weight on a chip
    c.data.phases = [
        dict(
            steps=858_000,
            sequence_length=4096,
            global_batch_size=1024,
            mixture=[dict(path="shards/web/train", weight=1)],
        ),
        dict(
            steps=286_000,
            sequence_length=4096,
            global_batch_size=1024,
            mixture=[dict(path="shards/web/train", weight=3), dict(path="shards/synthetic", weight=7)],
        ),
    ]
    c.data.micro_batches = 4  # 2 sequences a chip at a time
    c.optimizer.schedule = "wsd"
    c.optimizer.decay_fraction = 0.25
    c.optimizer.final_fraction = 0.0
    c.loss.z_loss = 1e-4
    c.checkpoint.keep_every = 20_000
    c.evaluation.sets = [dict(name="web", path="shards/web/validation")]
    c.evaluation.max_rows = 1024
    return c
