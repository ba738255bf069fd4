"""launch/tpu_babysit.sh against a cloud that plays back states and exit codes."""

import pytest

ABOUT = [
    "--name=pod",
    "--zone=us-east5-a",
    "--type=v5litepod-256",
    "--spot",
    "--ref=abc123",
    "--repository=https://x/y.git",
]
RUN = ["--", "--config=experiments/mini.py", "--workdir=gs://bucket/mini"]
NEW = ["create", "install", "start"]


def babysit(cloud, *flags):
    return cloud.run("tpu_babysit.sh", *ABOUT, *flags, *RUN)


def test_a_run_on_new_machines_until_it_is_done(cloud):
    cloud.script(states=["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], start=[0])
    ended = babysit(cloud)
    assert ended.code == 0 and cloud.verbs() == NEW
    assert "done" in ended.err


def test_machines_that_are_there_are_taken_and_given_back_when_asked(cloud):
    cloud.script(states=["ACTIVE"], start=[0])
    assert babysit(cloud, "--delete", "--preflight").code == 0
    assert cloud.verbs() == ["install", "preflight", "start", "delete"]


def test_a_mistake_of_the_user_ends_it_at_once(cloud):
    cloud.script(states=["ACTIVE"], start=[2])
    ended = babysit(cloud)
    assert ended.code == 2 and cloud.verbs() == ["install", "start"]
    assert "exit code 2" in ended.err


def test_stopped_on_request_is_started_again_without_counting(cloud):
    cloud.script(states=["ACTIVE"], start=[75, 75, 75, 75, 75, 0])
    assert babysit(cloud, "--max-crashes=2").code == 0
    assert cloud.verbs() == ["install"] + ["start"] * 6


@pytest.mark.parametrize("code", [255, 1, 75])
def test_preempted_machines_are_asked_for_anew(cloud, code):
    """ssh ends with 255 when the machine is gone; others of the slice may still say what they saw."""
    states = ["ACTIVE", "SUSPENDING", "SUSPENDED", "DELETING", "ABSENT", "WAITING_FOR_RESOURCES", "ACTIVE"]
    cloud.script(states=states, start=[code, 0])
    ended = babysit(cloud, "--max-crashes=1")
    assert ended.code == 0
    verbs = cloud.verbs()
    assert verbs[:2] == ["install", "start"] and verbs[-3:] == NEW and set(verbs[2:-3]) == {"delete"}


def test_a_slice_that_is_gone_while_its_request_is_still_active_is_asked_for_anew(cloud):
    """Else gcloud reaches the other slice alone, and the run waits there for one that does not come."""
    cloud.script(
        states=["ACTIVE"] * 3 + ["DELETING", "ABSENT", "ACTIVE"],
        machines=[["READY", "READY"], ["READY", "PREEMPTED"], ["PREEMPTED"], ["READY", "READY"]],
        start=[255, 0],
    )
    ended = babysit(cloud, "--slices=2", "--max-crashes=1")
    assert ended.code == 0 and cloud.verbs() == ["install", "start", "delete", *NEW]


def test_machines_under_repair_are_waited_for_and_installed_on_again(cloud):
    cloud.script(states=["ACTIVE"], machines=[["READY"], ["REPAIRING"], ["REPAIRING"], ["READY"]], start=[1, 0])
    assert babysit(cloud, "--max-crashes=1").code == 0
    assert cloud.verbs() == ["install", "start", "install", "start"]


def test_crashes_in_a_row_are_limited(cloud):
    cloud.script(states=["ACTIVE"], start=[1])
    ended = babysit(cloud, "--max-crashes=3")
    assert ended.code == 1 and cloud.verbs() == ["install", "start", "start", "start"]
    assert "given up after 3 crashes" in ended.err


def test_a_healthy_life_forgives_earlier_crashes(cloud):
    cloud.script(states=["ACTIVE"], start=[1, 1, 1, 1, 1, 0])
    assert babysit(cloud, "--max-crashes=2", "--healthy-minutes=0").code == 0


def test_a_request_that_fails_again_and_again_is_given_up(cloud):
    cloud.script(states=["FAILED"])
    ended = babysit(cloud, "--max-crashes=2")
    assert ended.code == 1 and "start" not in cloud.verbs()


def test_an_installation_that_fails_is_a_crash(cloud):
    cloud.script(states=["ACTIVE"], install=[1])
    ended = babysit(cloud, "--max-crashes=2")
    assert ended.code == 1 and cloud.verbs() == ["install", "install"]


def test_a_preflight_that_fails_ends_it_with_its_table(cloud):
    cloud.script(states=["ACTIVE"], preflight=[2])
    ended = babysit(cloud, "--preflight")
    assert ended.code == 2 and cloud.verbs() == ["install", "preflight"]


def test_a_cloud_that_does_not_answer_is_given_up(cloud):
    cloud.script(states=["BROKEN"])
    ended = babysit(cloud, "--max-crashes=2")
    assert ended.code == 1 and "UNAUTHENTICATED" in ended.err and cloud.verbs() == []


def test_silences_of_the_cloud_end_no_run(cloud):
    """It goes on without us; only many in a row are an end, and then nothing is given back."""
    some = ["BROKEN"] * 4
    cloud.script(states=["WAITING_FOR_RESOURCES", *some, "WAITING_FOR_RESOURCES", *some, "ACTIVE"], start=[0])
    assert babysit(cloud, "--max-crashes=2").code == 0 and cloud.verbs() == ["install", "start"]
    cloud.script(states=["WAITING_FOR_RESOURCES", "BROKEN"])
    ended = cloud.run("tpu_babysit.sh", *ABOUT, "--delete", *RUN, PATIENCE="5")
    assert ended.code == 1 and "left as they are" in ended.err and cloud.verbs() == ["install", "start"]


def test_flags_reach_the_scripts_that_it_calls(cloud):
    cloud.script(states=["ABSENT", "ACTIVE"], start=[0])
    babysit(cloud, "--slices=2", "--project=mine", "--data-mount=shards", "--data-to=/data")
    create, install, data, start = (
        a["arguments"] for a in cloud.asked() if a["arguments"][3] not in ("describe", "list", "scp")
    )
    assert {"--spot", "--node-count=2", "--project=mine", "--accelerator-type=v5litepod-256"} <= set(create)
    assert "--ref=abc123" in install[-1] and "--mount=shards --to=/data" in data[-1]
    assert start[-1].endswith("-- --config=experiments/mini.py --workdir=gs://bucket/mini")
    assert all("--node=all" in one and "--worker=all" in one for one in (install, data, start))
