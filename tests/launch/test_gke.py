"""What launch/gke.sh applies: the Jobs against Kubernetes' own schema, the rest field by field.

No package has the schemas of JobSet and Kueue; the fields below were read out of their CRDs (JobSet 0.10, Kueue 0.17).
"""

import json
import re

import pytest
from cloud_case import run

yaml = pytest.importorskip("yaml")

ABOUT = ["--name=mini", "--image=us-docker.pkg.dev/p/r/phijax:tpu-abc", "--tpu=v5e", "--topology=16x16"]
RUN = ["--", "--config=experiments/mini.py", "--workdir=gs://bucket/mini"]
EVERYTHING = ["--slices=2", "--queue=phijax", "--spot", "--data-bucket=shards", "--data-to=/data", "--namespace=team"]

# Field -> type or fields, of JobSet's spec without the Job's template; a list means a list of such.
JOBSET_SPEC = {
    "ttlSecondsAfterFinished": int,
    "failurePolicy": {
        "maxRestarts": int,
        "rules": [
            {
                "name": str,
                "action": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
                "onJobFailureReasons": [str],
                "onJobFailureMessagePatterns": [str],
            }
        ],
    },
    "replicatedJobs": [{"name": str, "replicas": int, "template": dict}],
}
KUEUE_SPECS = {
    "ResourceFlavor": {"nodeLabels": {}},
    "ClusterQueue": {
        "namespaceSelector": {},
        "preemption": {"withinClusterQueue": ("Never", "LowerPriority", "LowerOrNewerEqualPriority")},
        "resourceGroups": [
            {
                "coveredResources": [str],
                "flavors": [{"name": str, "resources": [{"name": str, "nominalQuota": int}]}],
            }
        ],
    },
    "LocalQueue": {"clusterQueue": str},
}


def fits(value, schema, where="spec"):
    if schema == {}:
        assert isinstance(value, dict), where
    elif isinstance(schema, dict):
        assert isinstance(value, dict) and set(value) <= set(schema), f"{where} has {set(value) - set(schema)}"
        for key, inner in value.items():
            fits(inner, schema[key], f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, where
        for inner in value:
            fits(inner, schema[0], where)
    elif isinstance(schema, tuple):
        assert value in schema, f"{where}: {value}"
    else:
        assert isinstance(value, schema), f"{where}: {value!r}"


def rendered(*flags):
    ended = run("gke.sh", "--dry-run", *flags)
    assert ended.code == 0, ended.err
    command, *text, end = ended.out.splitlines()
    assert (command, end) == ("kubectl apply --filename=- <<'YAML'", "YAML") and "@" not in ended.out
    return list(yaml.safe_load_all("\n".join(text)))


def jobset(*flags):
    (only,) = rendered(*ABOUT, *flags, *RUN)
    return only


def as_job(spec):
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": spec}


@pytest.mark.parametrize("flags", [[], EVERYTHING, ["--verb=preflight"]], ids=["least", "everything", "preflight"])
def test_the_jobset_is_one(flags):
    found = jobset(*flags)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    fits(found["spec"], JOBSET_SPEC)
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="the Job is not compared with its schema")
    for job in found["spec"]["replicatedJobs"]:
        whole = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "slice"},
            "spec": job["template"]["spec"],
        }
        kubernetes_validate.validate(whole, "1.31", strict=True)


def test_the_schema_would_see_a_wrong_field():
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="the Job is not compared with its schema")
    spec = jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]
    spec["podFailurePolicy"]["rules"][0]["onExitCode"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(as_job(spec), "1.31", strict=True)


def pod_of(found):
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]


def test_least_and_everything():
    least, most = jobset(), jobset(*EVERYTHING)
    assert least["metadata"].get("labels") is None and "metadata" not in pod_of(least)
    assert "volumes" in pod_of(least)["spec"] and len(pod_of(least)["spec"]["volumes"]) == 1
    assert most["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "phijax"}
    assert most["metadata"]["namespace"] == "team"
    assert pod_of(most)["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    data = pod_of(most)["spec"]["volumes"][1]["csi"]
    assert data["volumeAttributes"]["bucketName"] == "shards" and data["readOnly"]
    assert pod_of(most)["spec"]["containers"][0]["volumeMounts"][1]["mountPath"] == "/data"


@pytest.mark.parametrize(
    ("tpu", "topology", "slices", "label", "hosts", "chips"),
    [
        ("v5e", "16x16", 2, "tpu-v5-lite-podslice", 64, 4),
        ("v5p", "4x4x8", 1, "tpu-v5p-slice", 32, 4),
        ("v6e", "2x2", 1, "tpu-v6e-slice", 1, 4),
        ("v5e", "1x1", 1, "tpu-v5-lite-podslice", 1, 1),
    ],
)
def test_hosts_and_chips_of_a_slice(tpu, topology, slices, label, hosts, chips):
    flags = ["--name=a", "--image=b", f"--tpu={tpu}", f"--topology={topology}", f"--slices={slices}"]
    (found,) = rendered(*flags, *RUN)
    (slice_,) = found["spec"]["replicatedJobs"]
    job, pod = slice_["template"]["spec"], pod_of(found)["spec"]
    assert slice_["replicas"] == slices and job["parallelism"] == job["completions"] == hosts
    selector = pod["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == label
    assert selector["cloud.google.com/gke-tpu-topology"] == topology
    resources = pod["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": chips}


def test_exit_codes_lead_to_the_actions_that_they_mean():
    """Kubernetes says `... matching FailJob rule at index N` of the rule that failed a Job."""
    found = jobset()
    pod_rules = found["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert [rule.get("onExitCodes", {}).get("values") for rule in pod_rules] == [[2], [75], None]
    assert pod_rules[2]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert all(rule["action"] == "FailJob" for rule in pod_rules)

    def action(index):
        message = (
            f"Container phijax for pod default/mini failed with exit code N matching FailJob rule at index {index}"
        )
        rules = found["spec"]["failurePolicy"]["rules"]
        matching = [r for r in rules if any(re.search(p, message) for p in r["onJobFailureMessagePatterns"])]
        assert all(rule["onJobFailureReasons"] == ["PodFailurePolicy"] for rule in matching)
        return [rule["action"] for rule in matching]

    assert action(0) == ["FailJobSet"]
    assert action(1) == action(2) == ["RestartJobSetAndIgnoreMaxRestarts"]
    assert action(3) == []  # a crash: restarted by default, and counted


def test_arguments_arrive_as_they_were_given():
    odd = ['--config.data.phases[0].mixture[0].path=/data/"a b"', "--x=back\\slash", "--y=$HOME #no comment: {}"]
    found = run("gke.sh", "--dry-run", *ABOUT, *RUN, *odd)
    (document,) = yaml.safe_load_all("\n".join(found.out.splitlines()[1:-1]))
    container = pod_of(document)["spec"]["containers"][0]
    assert container["args"] == [*RUN[1:], *odd] and container["command"] == ["python", "-m", "phijax.main"]


def test_the_queue():
    found = rendered("--kueue", "--tpu=v5p", "--topology=4x4x8", "--slices=2", "--queue=phijax", "--namespace=team")
    assert [one["kind"] for one in found] == list(KUEUE_SPECS)
    for one in found:
        assert one["apiVersion"] == "kueue.x-k8s.io/v1beta2"
        fits(one["spec"], KUEUE_SPECS[one["kind"]])
    flavor, cluster, local = found
    (group,) = cluster["spec"]["resourceGroups"]
    assert group["flavors"][0]["name"] == flavor["metadata"]["name"]
    assert group["flavors"][0]["resources"][0]["nominalQuota"] == 256
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"]


def test_kubectl_gets_what_the_dry_run_shows(cloud):
    shown = cloud.run("gke.sh", "--dry-run", *ABOUT, *EVERYTHING, *RUN).out
    assert cloud.run("gke.sh", *ABOUT, *EVERYTHING, *RUN).code == 0
    (asked,) = cloud.asked()
    assert asked["name"] == "kubectl" and asked["arguments"] == ["apply", "--filename=-"]
    assert asked["stdin"].splitlines() == shown.splitlines()[1:-1]
    assert json.dumps(RUN[1:]) in shown


HOSTS_OF_64 = ["--image=i", "--tpu=v5e", "--topology=16x16"]  # their numbers go to 63


@pytest.mark.parametrize("name", ["a", "a1", "mini-2", "m" * 42, "a--b"])
def test_names_that_the_cluster_takes(name):
    """JobSet's webhook checks NAME-slice-1-63-abcde as a DNS label (RFC 1035) of 63 characters."""
    (found,) = rendered(f"--name={name}", *HOSTS_OF_64, "--slices=2", *RUN)
    pod = f"{found['metadata']['name']}-slice-1-63-abcde"
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", pod)


NAMES_TO_REFUSE = ["m" * 47, "phi3-mini-" * 6 + "x", "Mini_Run", "MINI", "-mini", "mini-", "mini.v2", "2mini", "mi ni"]
NAMES_TO_REFUSE += ["mini/x", "été", "-", "a:b", "a@b", "--help"]


@pytest.mark.parametrize("name", NAMES_TO_REFUSE)
@pytest.mark.parametrize("script", ["gke.sh", "gke.sh --delete", "xpk.sh"])
def test_names_that_only_the_cluster_would_refuse(name, script):
    script, *flags = script.split()
    place = ["--cluster=c", "--zone=z", "--tpu-type=t", "--image=i"] if script == "xpk.sh" else HOSTS_OF_64
    if len(name) > 46 and flags:
        return  # how long the numbers behind it are is not said
    ended = run(script, f"--name={name}", *place, *flags, "--dry-run", *RUN)
    assert ended.code == 2 and "--name=" in ended.err and len(ended.err.splitlines()) == 1 and ended.out == "", ended


def test_a_name_has_room_for_the_numbers_of_slices_and_hosts():
    def code(length, *more):
        return run("gke.sh", f"--name={'m' * length}", *HOSTS_OF_64, *more, "--dry-run", *RUN).code

    assert (code(46), code(47)) == (0, 2)  # 63 - len("-slice-0-63-abcde")
    assert (code(44, "--slices=1000"), code(45, "--slices=1000")) == (0, 2)


@pytest.mark.parametrize(
    "flag",
    ["--namespace=Team", "--namespace=a_b", "--queue=Phi", "--queue=x-", "--max-restarts=many", "--max-restarts=-1"]
    + ["--grace-seconds=10m", "--slices=0", "--topology=0x0", "--topology=08x8", "--data-bucket=gs://b"],
)
def test_other_values_that_only_the_cluster_would_refuse(flag):
    more = ["--data-to=/data"] if "data" in flag else []
    ended = run("gke.sh", *ABOUT, flag, *more, "--dry-run", *RUN)
    name = flag.split("=")[0]
    assert ended.code == 2 and f"error: {name}=" in ended.err and len(ended.err.splitlines()) == 1, ended.err


def test_names_that_yaml_reads_as_something_else_stay_names():
    (found,) = rendered("--name=true", *ABOUT[1:], "--queue=12", "--namespace=0x10", *RUN)
    assert found["metadata"]["name"] == "true" and found["metadata"]["namespace"] == "0x10"
    assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "12"
