"""The child that strangers' files are tried in: what goes beyond its limits ends it alone; it ends with its parent."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from phijax.text import limited_child
from phijax.text.limited_child import Stopped, ask

pytest.importorskip("jinja2")
SIZE = 256 << 20


def render(template, seconds=2):
    variables = {"bos_token": "", "eos_token": ""}
    conversations = [([{"role": "user", "content": "Hi"}], False)]
    (answer,) = ask(
        "render", seconds=seconds, size=SIZE, template=template, conversations=conversations, variables=variables
    )
    return answer["text"]


def child() -> int:
    """Its process id."""
    return limited_child._of_process(os.getpid())._process.pid


def is_running(pid) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid) -> bool:
    for _ in range(600):
        if not is_running(pid):
            return True
        time.sleep(0.05)
    return False


ENDLESS = (
    "{% for a in s %}{% for b in s %}{% for c in s %}{% for d in s %}{% endfor %}{% endfor %}{% endfor %}{% endfor %}"
)
ENDLESS = "{% set s = '" + "x" * 3000 + "' %}" + ENDLESS


def test_one_child_answers_all():
    assert render("{{ messages[0].content }}") == "Hi"
    first = child()
    assert render("\u00e9 {{ '\\ud800' }}") == "\u00e9 \ud800"
    assert child() == first


@pytest.mark.parametrize(
    ("template", "did"),
    [("{{ 'a'.ljust(4000000000) }}", "asked for more than 256 MB"), (ENDLESS, "more than 0.2 s of processor time")],
)
def test_beyond_its_limits_it_is_killed_and_replaced(template, did):
    assert render("before") == "before"
    before = child()
    with pytest.raises(Stopped, match=did):
        render(template, seconds=0.2)
    assert render("{{ 'a'.ljust(3) }}") == "a  "
    assert child() != before and not is_running(before)


PARENT_THAT_TOOK_THE_SIGNAL = """
import signal, sys
from phijax.text import limited_child
if sys.argv[1] == "ignored":
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
else:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
limited_child._WALL = 1
arguments = {"template": sys.argv[2], "conversations": [([], False)], "variables": {}}
try:
    list(limited_child.ask("render", seconds=0.2, size=256 << 20, **arguments))
except limited_child.Stopped as stopped:
    print(stopped)
"""


@pytest.mark.parametrize("how", ["blocked", "ignored"])
def test_the_limit_of_time_holds_where_a_library_of_the_parents_took_its_signal(how):
    """In a process of its own: libtpu's timer runs in this one, once a pod's program was compiled, and would end it."""
    command = [sys.executable, "-c", PARENT_THAT_TOOK_THE_SIGNAL, how, ENDLESS]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "more than 0.2 s of processor time" in said.stdout, said.stderr


def test_the_clock_ends_what_no_limit_does(monkeypatch):
    """A child that waits takes no time of the processor."""
    assert render("before") == "before"
    monkeypatch.setattr(limited_child, "_WALL", -3)
    os.kill(child(), signal.SIGSTOP)
    with pytest.raises(Stopped, match="took more than 1 s"):
        render("after", seconds=1)


def test_a_child_that_was_killed_is_replaced():
    assert render("before") == "before"
    os.kill(child(), signal.SIGKILL)
    assert ends(child())
    assert render("after") == "after"


def test_signals_to_the_whole_group_are_the_parents():
    """Ctrl-C at a terminal, SIGTERM by a scheduler: a run that saves may still need its child."""
    assert render("before") == "before"
    before = child()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(before, number)
    assert render("after") == "after"
    assert child() == before


def test_a_large_request_leaves_no_large_child():
    assert ask("try_tokenizer", seconds=2, size=SIZE, spec=" " * (5 << 20), texts=[])["refused"]
    assert not is_running(child())
    assert render("after") == "after"


def test_answers_of_threads_do_not_mix():
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: [render(f"{i} {n}") for n in range(20)]}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [f"{i} {n}" for n in range(20)] for i in range(8)}


def test_a_forked_process_has_its_own():
    """And leaves its parent's alone when it ends as a process does, by its exit handlers."""
    program = (
        "import os, sys, phijax.text.limited_child as c\n"
        "ask = lambda: c.ask('try_tokenizer', seconds=1, size=1 << 28, spec='{}', texts=[])\n"
        "pid = lambda: c._of_process(os.getpid())._process.pid\n"
        "ask(); mine = pid(); forked = os.fork()\n"
        "if not forked:\n"
        "    ask(); assert pid() != mine; sys.exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 7\n"
        "ask(); assert pid() == mine; print('kept')\n"
    )
    assert run(program).stdout == "kept\n"


def run(program, **options):
    options = {"env": {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, **options}
    return subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, **options)


ASK = "from phijax.text.limited_child import ask, _of_process\nimport os, signal, sys\n"
ASK += "ask('try_tokenizer', seconds=1, size=1 << 28, spec='{}', texts=[])\n"
ASK += "print(_of_process(os.getpid())._process.pid, flush=True)\n"


@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(2)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_it_ends_with_its_parent(end):
    assert ends(int(run(ASK + end).stdout))


def test_it_needs_no_home_and_imports_no_jax(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "TMPDIR")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    program = ASK + "maps = open(f'/proc/{_of_process(os.getpid())._process.pid}/maps').read()\n"
    program += "print('jaxlib' in maps, 'numpy' in maps, 'jax' in sys.modules)\n"
    done = run(program, env=environment, cwd=tmp_path)
    assert done.stdout.splitlines()[1:] == ["False False False"], done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_way_to_start_it_that_is_said(monkeypatch):
    from phijax.errors import UserError

    monkeypatch.setattr(limited_child.sys, "executable", "/nowhere/python")
    with pytest.raises(UserError, match="cannot be started"):
        limited_child._Child().ask("render", 1, SIZE, {})
