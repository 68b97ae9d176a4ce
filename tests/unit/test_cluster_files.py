"""The files in cluster/ are valid for the tools that read them: Ray, Kubernetes, KubeRay, a shell, Docker."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
TOOLS = Path(sys.executable).parent


def documents() -> list[dict[str, Any]]:
    return [dict(document) for document in yaml.safe_load_all((CLUSTER / "rayjob.yaml").read_text())]


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = (document for document in documents() if document["kind"] == kind)
    return found


def test_rays_launcher_accepts_the_cluster_and_its_defaults() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    filled = prepare_config(copy.deepcopy(config))
    validate_config(filled)
    assert filled["available_node_types"]["gpu"]["max_workers"] == 8
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config({**filled, "max_worker": 8})


def test_every_ray_is_started_with_tokens_and_no_dashboard_is_open() -> None:
    config = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    starts = [
        line
        for side in ("head", "worker")
        for line in config[f"{side}_start_ray_commands"]
        if re.search(r"\bray start\b", line)
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    everything = "".join(path.read_text() for path in CLUSTER.glob("*") if path.suffix != ".svg")
    assert "dashboard-host=0.0.0.0" not in everything
    assert "export RAY_AUTH_MODE=token" in (CLUSTER / "slurm.sbatch").read_text()
    assert of_kind("RayJob")["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def object_of(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": required.split(), "additionalProperties": False,
    }  # fmt: skip


TEXT, FLAG, WHOLE, ANY = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}, {"type": "object"}
WORDS = {"type": "object", "additionalProperties": TEXT}
AUTOSCALER = object_of(
    resources=ANY, image=TEXT, imagePullPolicy=TEXT, securityContext=ANY, idleTimeoutSeconds=WHOLE,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}, version={"enum": ["v1", "v2"]},
)  # fmt: skip
HEAD = object_of(
    "template", template=ANY, headService=ANY, enableIngress=FLAG, rayStartParams=WORDS, resources=WORDS, labels=WORDS,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
)  # fmt: skip
WORKERS = object_of(
    "groupName template", groupName=TEXT, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, suspend=FLAG,
    idleTimeoutSeconds=WHOLE, numOfHosts=WHOLE, rayStartParams=WORDS, resources=WORDS, labels=WORDS, template=ANY,
)  # fmt: skip
RAY_CLUSTER = object_of(
    "headGroupSpec", rayVersion=TEXT, headGroupSpec=HEAD, workerGroupSpecs={"type": "array", "items": WORKERS},
    authOptions=object_of(mode={"enum": ["disabled", "token"]}, secretName=TEXT), autoscalerOptions=AUTOSCALER,
    enableInTreeAutoscaling=FLAG, gcsFaultToleranceOptions=ANY, suspend=FLAG, managedBy=TEXT,
    headServiceAnnotations=WORDS,
)  # fmt: skip
RAY_JOB = object_of(
    "entrypoint rayClusterSpec", entrypoint=TEXT, rayClusterSpec=RAY_CLUSTER, runtimeEnvYAML=TEXT, jobId=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]}, backoffLimit=WHOLE,
    activeDeadlineSeconds=WHOLE, shutdownAfterJobFinishes=FLAG, ttlSecondsAfterFinished=WHOLE, suspend=FLAG,
    submitterPodTemplate=ANY, submitterConfig=ANY, metadata=WORDS, clusterSelector=WORDS, managedBy=TEXT,
    entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"}, entrypointResources=TEXT,
    deletionStrategy=ANY,
)  # fmt: skip
"""Field names and types of KubeRay's ray.io/v1 RayJob, from its API reference (1.6)."""


def test_the_ray_job_has_only_fields_that_kuberay_knows() -> None:
    job = of_kind("RayJob")
    assert job["apiVersion"] == "ray.io/v1"
    jsonschema.validate(job["spec"], RAY_JOB)
    misspelt = copy.deepcopy(job["spec"])
    misspelt["rayClusterSpec"]["workerGroupSpec"] = []
    with pytest.raises(jsonschema.ValidationError, match="workerGroupSpec"):
        jsonschema.validate(misspelt, RAY_JOB)


def test_kubernetes_accepts_the_pods_the_claim_and_the_policy() -> None:
    cluster = of_kind("RayJob")["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, **group["template"]} for group in groups]
    for document in [*pods, of_kind("PersistentVolumeClaim"), of_kind("NetworkPolicy")]:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**pods[0], "spec": {"container": []}}, kubernetes_validate.latest_version())


def test_no_pod_runs_as_root_or_holds_a_secret_in_its_environment() -> None:
    cluster = of_kind("RayJob")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert not [e["name"] for e in container["env"] if re.search("KEY$|TOKEN$|SECRET", e["name"])]


def test_the_cluster_s_ray_is_the_one_that_is_tested() -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned
    assert of_kind("RayJob")["spec"]["rayClusterSpec"]["rayVersion"] == pinned[1]


@pytest.mark.parametrize("tool", [("bash", "-n"), (str(TOOLS / "shellcheck"),)], ids=["bash", "shellcheck"])
def test_the_slurm_script_is_sound(tool: tuple[str, ...]) -> None:
    done = subprocess.run([*tool, str(CLUSTER / "slurm.sbatch")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_has_no_linter_s_complaint() -> None:
    words = [str(TOOLS / "hadolint"), str(CLUSTER / "Dockerfile")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_copies_all_that_the_package_is_made_of() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    roots = {name.split(".")[0] for name in setup["options"]["packages"].split()}
    copied = set(re.findall(r"^COPY (?!constraints|--from)(\S+)", (CLUSTER / "Dockerfile").read_text(), re.M))
    assert (CLUSTER / "Dockerfile").read_text().count("COPY --from=code /code .") == 2
    assert copied == (roots - {"fedtailor"}) | {"platform"}


def entrypoints() -> list[str]:
    return [
        of_kind("RayJob")["spec"]["entrypoint"],
        *re.findall(r"fedtailor run [^#\n]*(?:\\\n[^#\n]*)*", (CLUSTER / "README.md").read_text()),
    ]


@pytest.mark.parametrize("words", entrypoints())
def test_every_command_shown_composes(words: str) -> None:
    from fedtailor.experiment.compose import compose

    said = words.replace("\\\n", " ").replace("'", "").partition("fedtailor run ")[2].split("`")[0].split()
    presets = [word for word in said if re.fullmatch(r"[a-z][a-z0-9_]*", word) and word != said[-1]]
    compose(presets, [word for word in said if re.fullmatch(r"[a-z][\w.]*=\S+", word)])


def test_the_runtime_environment_carries_no_secret_and_no_bulk() -> None:
    environment = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())
    assert not [name for name in environment.get("env_vars", {}) if re.search("KEY|TOKEN|SECRET", name)]
    assert {"/.git/", "/.venv/", "/runs/"} <= set(environment["excludes"])
