"""What scripts and dashboards rely on: names of the files in a workdir, and of the numbers in its metrics."""

from run_case import metrics

FILES = {"checkpoints", "compile_cache", "config.json", "events.jsonl", "metrics.jsonl", "tokenizer"}
METRICS = set(
    "step time loss nll grad_norm learning_rate tokens predicted_tokens skipped_steps skipped_in_a_row step_seconds "
    "tokens_per_second mfu goodput host_memory_bytes".split()
)
HELD_OUT = {"heldout_loss/b", "heldout_perplexity/b", "heldout_tokens/b"}


def test_a_workdir_and_its_metrics_keep_their_names(unbroken):
    names = {path.name for path in unbroken.iterdir()}
    assert names >= FILES, FILES - names
    lines = metrics(unbroken)
    # The last step of eight is evaluated.
    assert set(lines[7]) >= METRICS | HELD_OUT, (METRICS | HELD_OUT) - set(lines[7])
