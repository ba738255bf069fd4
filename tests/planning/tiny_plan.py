"""Experiment file of a model small enough to be compiled for 4 chips in a test; its axes are no multiples of others."""

import phijax.config


def get_config():
    c = phijax.config.defaults()
    c.model.preset = "phi3_mini"
    c.model.vocab_size = 2000
    c.model.model_dim = 384
    c.model.num_layers = 3
    c.model.num_heads = 4
    c.model.num_kv_heads = 4
    c.model.ffn_dim = 1024
    c.model.sliding_window = None
    c.mesh = dict(data=1, fsdp=4)
    c.data.phases = [dict(steps=1000, sequence_length=1024, global_batch_size=16, mixture=[dict(path="x", weight=1)])]
    c.optimizer.warmup_steps = 10
    return c
