"""The text that every CPython carries: enough of it, the same every time, and prose."""

import ast
import json
import os
import pathlib
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).parent.parent
SCRIPT = REPOSITORY / "experiments" / "python_text.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def test_python_text(tmp_path):
    twice = [
        subprocess.Popen([sys.executable, SCRIPT, f"--output={tmp_path / name}"], env=ENVIRONMENT)
        for name in ("one", "two")
    ]
    assert [process.wait() for process in twice] == [0, 0]
    content = (tmp_path / "one" / "python_text.jsonl").read_bytes()
    assert content == (tmp_path / "two" / "python_text.jsonl").read_bytes()
    documents = [json.loads(line) for line in content.splitlines()]
    texts = {document["id"]: document["text"] for document in documents}
    assert len(texts) == len(documents) > 300
    assert sum(map(len, texts.values())) > 1_500_000
    assert "for_stmt" in texts["topic/for"]
    described = ast.get_docstring(ast.parse(pathlib.Path(json.__file__).read_text()))
    assert texts["module/json"].startswith(f"json\n\n{described.strip()}")
    assert "json.dumps\n\nSerialize ``obj`` to a JSON formatted ``str``." in texts["module/json"]
    assert not [name for name in texts if name.startswith(("module/test.", "module/site-packages"))]


def test_without_output():
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 2 and "Usage: python experiments/python_text.py --output=DIR" in result.stderr
