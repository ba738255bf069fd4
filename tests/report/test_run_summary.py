import json
import math

from phijax.report.summary import summarise


def test_first_last_and_latest_held_out_beside_the_baselines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 0, "loss": 7.5},
        {"step": 5, "loss": 5.0, "heldout_loss/web": 5.5},
        {"step": 9, "loss": 4.0, "heldout_loss/web": 4.5},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = summarise(path, {"uniform": math.log(2048)})
    assert [line.split()[-6] for line in lines] == ["7.5000", "4.0000", "4.5000", "7.6246"]
    assert "step 9" in lines[1] and "web" in lines[2] and lines[3].endswith("perplexity 2,048.0")


def test_a_run_without_metrics_has_no_summary(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert summarise(tmp_path / "metrics.jsonl", {"uniform": 1.0}) == []
