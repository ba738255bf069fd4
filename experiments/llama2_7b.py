"""Llama-2-7B's shape on one v5p-64: python -m phijax.main --config=experiments/llama2_7b.py --workdir=gs://bucket/llama

The recipe of its paper (Touvron et al. 2023, arXiv:2307.09288, section 2.2): 4M tokens a step, 2T in all.
"""

import phijax.config


def get_config():
    c = phijax.config.defaults()
    c.model.preset = "llama2_7b"
    c.mesh = dict(data=2, fsdp=32)  # 64 chips; 32 keeps 344 rows of the MLP on a chip
    c.data.phases = [
        dict(
            steps=480_000,
            sequence_length=4096,
            global_batch_size=1024,
            mixture=[dict(path="shards/web/train", weight=1)],
        )
    ]
    c.data.micro_batches = 8
    c.optimizer.learning_rate = 3e-4
    c.optimizer.eps = 1e-5
    c.evaluation.sets = [dict(name="web", path="shards/web/validation")]
    c.evaluation.max_rows = 1024
    return c
