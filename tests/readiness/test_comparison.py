"""What is concluded from the facts of all processes."""

import dataclasses

import pytest

from phijax.readiness import check, comparison, host
from phijax.readiness.check import FAIL, OK, WARNING, Check
from phijax.readiness.host import Host

GB = 10**9
ONE = Host(
    "node0", {"python": "3.11.7", "jax": "0.10.2", "libtpu": "1", "flax": "1", "code": "a"}, 100 * GB, None, 4096
)


def named(number, **changes):
    return dataclasses.replace(ONE, name=f"node{number}", **changes)


def test_a_single_other_version_is_named_with_its_host():
    other = {**ONE.versions, "jax": "0.10.1"}
    found = comparison.versions([named(0), named(1), named(2, versions=other), named(3)])
    assert found.verdict == FAIL and "jax: 0.10.2 on 3 processes, 0.10.1 on node2" in found.text
    assert comparison.versions([named(0), named(1)]).verdict == OK


def test_the_digest_of_the_code_sees_a_changed_line_and_a_new_file(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    first = host.code_digest(tmp_path)
    (tmp_path / "b.py").write_text("")
    second = host.code_digest(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert len({first, second, host.code_digest(tmp_path)}) == 3


@pytest.mark.parametrize("source", ["kernel.cc", "kernel.h"])
def test_the_digest_of_the_code_sees_a_changed_kernel_and_nothing_that_was_built(tmp_path, source):
    (tmp_path / source).write_text("int x = 1;\n")
    first = host.code_digest(tmp_path)
    (tmp_path / "kernel.so").write_bytes(b"built")
    assert host.code_digest(tmp_path) == first
    (tmp_path / source).write_text("int x = 2;\n")
    assert host.code_digest(tmp_path) != first


@pytest.mark.parametrize(
    ("needed", "verdict"), [([10, 10, 10], OK), ([45, 45, 10], WARNING), ([60, 60, 10], FAIL), ([10, 10, 110], FAIL)]
)
def test_processes_of_one_host_share_its_memory(needed, verdict):
    hosts = [named(0), named(0), named(1)]
    found = comparison.memory(hosts, [{"state": gb * GB // 4, "a save": gb * GB * 3 // 4} for gb in needed])
    assert found.verdict == verdict
    assert "state" in found.text and "a save" in found.text  # whose bytes they are


def test_memory_without_a_config_is_only_told():
    found = comparison.memory([named(0), named(1, memory=7 * GB)], [None, None])
    assert found.verdict == OK and "7.0 GB" in found.text and "no --config" in found.text
    bad = comparison.BAD_CONFIG
    for one in (comparison.memory([named(0)], [None], bad), comparison.disk([named(0, disk=GB)], None, 0, bad)):
        assert one.verdict == OK and "no --config" not in one.text and "see above" in one.text


def test_disk_holds_every_kept_checkpoint():
    hosts = [named(0, disk=50 * GB)]
    assert comparison.disk(hosts, 10 * GB, kept=5).verdict == OK
    assert comparison.disk(hosts, 10 * GB, kept=6).verdict == FAIL
    assert comparison.disk([named(0)], 10 * GB, kept=6).verdict == OK  # an object store


def test_open_files_count_shards_and_an_unlimited_host_is_no_limit():
    assert comparison.open_files([named(0, open_files=1024)], 700).verdict == OK
    found = comparison.open_files([named(0), named(1, open_files=1024)], 800)
    assert found.verdict == FAIL and "on node1" in found.text and "ulimit -n" in found.text
    assert comparison.open_files([named(0, open_files=-1)], 10**6).verdict == OK


def test_devices_must_be_alike_and_as_many_as_expected():
    four = ["TPU v5 lite"] * 4
    hosts = [named(0), named(1)]
    assert comparison.devices([four, four], hosts, 8).verdict == OK
    assert comparison.devices([four, four], hosts, 16).verdict == FAIL
    assert "node1" in comparison.devices([four, four[:3]], hosts, None).text


def test_clocks():
    assert comparison.clocks(0.01).verdict == OK
    assert comparison.clocks(2.5).verdict == FAIL
    assert comparison.clocks(None).verdict == OK


def test_the_worst_answer_of_all_processes_is_shown_with_its_host():
    answers = [[Check("storage", OK, "fine")], [Check("storage", FAIL, "read-only")], [Check("storage", OK, "fine")]]
    (row,) = check.merge(answers, ["node0", "node1", "node2"])
    assert row == Check("storage", FAIL, "process 1 on node1: read-only")
    assert check.merge([check.decode(check.encode(one)) for one in answers], "abc")[0].verdict == FAIL
    same = [[Check("data", FAIL, "no such folder")]] * 3
    assert check.merge(same, ["a", "b", "c"]) == [Check("data", FAIL, "no such folder")]  # said once


def test_the_table_ends_in_one_verdict():
    good, bad = Check("clocks", OK, "fine"), Check("all-reduce", FAIL, "3, not 6")
    assert check.table([good, Check("memory", WARNING, "tight")], 2.0)[-1] == "READY: 2 checks in 2.0 s, 1 warnings"
    lines = check.table([good, bad], 2.0)
    assert lines[-1] == "NOT READY: 1 of 2 checks failed: all-reduce" and "FAIL     3, not 6" in lines[1]
    assert check.ready([good]) and not check.ready([good, bad])
