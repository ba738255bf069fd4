"""Processes that were started alike, or not: threads that speak as processes do."""

import copy
import json
import threading

import jax
import pytest

from phijax import config as configs
from phijax.errors import UserError
from phijax.parallel import processes
from phijax.parallel.processes import ProcessFailure
from phijax.readiness import agreement

PHASE = dict(steps=10, sequence_length=64, global_batch_size=8, mixture=[dict(path="shards/a", weight=1)])
DEFAULT = configs.Config().optimizer.learning_rate


@pytest.fixture
def together(monkeypatch):
    """together(act, count): act(index) in `count` threads at once -> what each returned or raised, what was said."""
    own, said, meeting = threading.local(), {}, []

    def exchange(name, text, seconds):
        with meeting[1]:
            said.setdefault(name, {})[own.index] = text
        meeting[0].wait()
        return [text for _, text in sorted(said[name].items())]

    def together(act, count=3):
        meeting[:] = threading.Barrier(count, timeout=5), threading.Lock()
        ends = [None] * count

        def run(index):
            own.index = index
            try:
                ends[index] = act(index)
            except Exception as error:
                ends[index] = error

        threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return ends, said

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes, "exchange", exchange)
    monkeypatch.setattr(processes, "barrier", lambda name, seconds, text="": exchange(name, text, seconds))
    return together


def of_config(*overrides, phases=(PHASE,)):
    tree = configs.to_dict(configs.Config()) | {"data": {"phases": copy.deepcopy(list(phases))}}
    for key, value in overrides:
        configs._override(tree, key, value)
    return agreement.of_config(configs.to_dict(configs.from_dict(tree)))


def compared(together, facts_of, count=3):
    def act(index):
        with agreement.alike("config", 5) as facts:
            facts.add(*facts_of(index))

    return together(act, count)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("optimizer.learning_rate", "0.5", f"optimizer.learning_rate: {DEFAULT} on 2 processes, 0.5 on "),
        ("seed", "7", "seed: 0 on 2 processes, 7 on "),
        ("data.phases[0].steps", "11", "data.phases[0].steps: 10 on 2 processes, 11 on "),
        ("data.phases[0].global_batch_size", "16", "data.phases[0].global_batch_size: 8 on 2 processes, 16 on "),
        ("data.phases[0].mixture[0].weight", "2", "data.phases[0].mixture[0].weight: 1"),
        ("model.sliding_window", "8", "model.sliding_window: preset on 2 processes, 8 on "),
        ("mesh.fsdp", "2", "mesh.fsdp: -1 on 2 processes, 2 on "),
        ("init_from", "weights", "init_from: None on 2 processes, given on "),
    ],
)
def test_a_key_that_differs_is_named_with_process_and_both_values(together, key, value, line):
    changed = of_config((key, value))
    ends, _ = compared(together, lambda index: (changed if index == 2 else of_config(),))
    for end in ends:
        assert isinstance(end, UserError)
        (found,) = [text for text in str(end).splitlines() if text.startswith("  ")]
        assert found.strip().startswith(line) and found.endswith("(process 2)")


def test_a_phase_that_one_process_has_is_absent_on_the_others(together):
    more = of_config(phases=(PHASE, PHASE))
    ends, _ = compared(together, lambda index: (more if index == 0 else of_config(),))
    assert all("data.phases[1].steps: absent on 2 processes, 10 on " in str(end) for end in ends)


def test_alike_is_one_short_message_of_each(together):
    many = of_config(phases=[PHASE] * 200)
    ends, said = compared(together, lambda index: (many,))
    assert ends == [None] * 3 and list(said) == ["alike: config"]
    assert all(len(text) < 1000 for text in said["alike: config"].values())


def test_values_are_said_of_the_sections_that_differ(together):
    _, said = compared(together, lambda index: (of_config(("optimizer.b1", "0.5")) if index else of_config(),))
    values = json.loads(said["alike: config: values"][0])["values"]
    assert values and all(key.startswith("optimizer.") for key in values)


def test_not_a_number_is_like_itself_and_one_is_not_true(together):
    assert compared(together, lambda index: ({"a": float("nan")},))[0] == [None] * 3
    assert isinstance(compared(together, lambda index: ({"b": True if index else 1},))[0][0], UserError)


def test_a_tie_names_the_second_half():
    label = [f"node{i} (process {i})" for i in range(4)]
    lines = agreement.comparison.differences([{"seed": i // 2} for i in range(4)], label)
    assert lines == ["seed: 0 on 2 processes, 1 on node2 (process 2), node3 (process 3)"]


def fingerprint(*paths, digests=None):
    mixture = [dict(path=path, weight=1, digest=(digests or {}).get(path, "a" * 64)) for path in paths]
    return {"seed": 0, "tokenizer": "t" * 64, "phases": [dict(steps=10, mixture=mixture)]}


def by_data(together, fingerprints, held_out=((), (), ())):
    facts = [agreement.of_data(*pair) for pair in zip(fingerprints, held_out, strict=True)]
    return compared(together, lambda index: (facts[index].values, facts[index].remarks))[0]


def test_paths_may_differ_where_the_content_is_the_same(together):
    own = [fingerprint(f"/disk{index}/a") for index in range(3)]
    assert by_data(together, own, [[(f"/disk{index}/v", "d" * 64)] for index in range(3)]) == [None] * 3
    assert of_config() == of_config(("data.phases[0].mixture[0].path", "elsewhere"))


def test_other_content_is_named_with_its_folder(together):
    other = fingerprint("/b", digests={"/b": "b" * 64})
    for end in by_data(together, [fingerprint("/a"), fingerprint("/a"), other]):
        assert f"data.phases[0].mixture[0].path: digest {'a' * 12} (/a) on 2 processes, digest {'b' * 12} (/b)" in str(
            end
        )
    ends = by_data(together, [fingerprint("/a")] * 3, [[("/v", "d" * 64)], [("/v", "d" * 64)], [("/v", "e" * 64)]])
    assert "evaluation.sets[0].path: digest dddddddddddd (/v) on 2 processes, digest eeeeeeeeeeee (/v)" in str(ends[0])


def test_two_copies_are_not_one_folder_named_twice(together):
    """The second of one folder goes on where the first stands; of two copies it begins at the first row."""
    ends = by_data(together, [fingerprint("/a", "/a"), fingerprint("/a", "/a"), fingerprint("/a", "/copy")])
    assert all(isinstance(end, UserError) and "data.phases[0].mixture[1].path" in str(end) for end in ends)


def failing(together, error, who=(2,)):
    def act(index):
        with agreement.alike("data", 5):
            if index in who:
                raise error

    return together(act)[0]


def test_a_mistake_of_one_is_a_mistake_for_all(together):
    mistake = UserError("No shards at /x.")
    *others, own = failing(together, mistake)
    assert own is mistake
    for end in others:
        assert isinstance(end, UserError) and str(end).startswith("process 2 on ")
        assert str(end).endswith("cannot go on: No shards at /x.")


def test_a_crash_of_one_is_a_failure_of_all(together):
    crash = OSError(116, "Stale file handle")
    *others, own = failing(together, crash)
    assert own is crash
    for end in others:
        assert isinstance(end, ProcessFailure) and "OSError: [Errno 116] Stale file handle" in str(end)


def test_alone_nothing_is_said(monkeypatch):
    monkeypatch.setattr(processes, "exchange", None)
    with agreement.alike("config", 5) as facts:
        facts.add({"seed": 1})
