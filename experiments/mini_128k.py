"""phi-3-mini to 128K on one v5p-128: python -m phijax.main --config=experiments/mini_128k.py --workdir=gs://bucket/128k

Goes on from a run of experiments/mini.py: --config.init_from=gs://bucket/mini/checkpoints/800000. The declared length
of every program exceeds 4096, so all phases rotate with the long factors.
"""

import phijax.config


def get_config():
    c = phijax.config.defaults()
    c.model.preset = "phi3_mini_128k"
    # By hand, since weights of 4096 are to start it: what only the preset says would be refused as an oversight.
    c.model.max_position = 131_072
    c.model.long_rope_from = "phi3_mini_128k"
    c.model.sliding_window = None
    c.model.remat = "save_all"
    c.mesh = dict(data=1, fsdp=16, context=8)  # 128 chips; a sequence of 128K is 16K tokens a chip
    c.compiler.profile = "sparse_core"  # keys and values are gathered while the core works
    c.data.phases = [
        dict(steps=2000, sequence_length=32_768, global_batch_size=64, mixture=[dict(path="shards/long", weight=1)]),
        dict(steps=2000, sequence_length=131_072, global_batch_size=16, mixture=[dict(path="shards/long", weight=1)]),
    ]
    c.optimizer.learning_rate = 5e-5
    c.optimizer.schedule = "linear"
    c.optimizer.warmup_steps = 100
    c.optimizer.final_fraction = 0.0
    c.checkpoint.every_steps = 250
    c.evaluation.every_steps = 250
    c.evaluation.sets = [dict(name="long", path="shards/long_validation")]
    c.evaluation.max_rows = 64
    return c
