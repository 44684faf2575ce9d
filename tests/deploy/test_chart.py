"""The chart in real helms: what it makes is valid, and means what was meant."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from rtml.link.keys import make_keys
from tests.deploy.helm import CHART, SOURCES, VALUES, Helm, after, command_of, of_kind, pod_specs

KUBERNETES = ("1.29", "1.33", "1.37")
GPU = "nvidia.com/gpu"
MIB = 1 << 20


@pytest.fixture(scope="module")
def rendered(helm: Helm) -> dict[str, list[dict[str, Any]]]:
    """By the name of the values."""
    return {name: helm.template(name) for name in VALUES}


def mebibytes(quantity: str) -> int:
    return int(quantity[:-2]) * {"Mi": 1, "Gi": 1024, "Ti": 1024 * 1024}[quantity[-2:]]


# --- valid ------------------------------------------------------------------------------------------------------------


def test_the_helms_are_those_that_were_asked_for(each_helm: Helm) -> None:
    assert each_helm.run("version", "--short").stdout.startswith(f"v{each_helm.version}+")


@pytest.mark.parametrize("values", [None, *VALUES])
def test_lint(each_helm: Helm, values: str | None) -> None:
    done = each_helm.run("lint", "--strict", CHART, *([f"--values={VALUES[values]}"] if values else []))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 chart(s) linted, 0 chart(s) failed" in done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("values", VALUES)
def test_both_helms_make_the_same(each_helm: Helm, values: str, rendered: dict[str, list[dict[str, Any]]]) -> None:
    def by_name(documents: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
        return {(document["kind"], document["metadata"]["name"]): document for document in documents}

    documents = each_helm.template(values)
    assert by_name(documents) == by_name(rendered[values])
    assert len(by_name(documents)) == len(documents), "two objects have the same name"


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("values", VALUES)
def test_kubernetes_takes_it(helm: Helm, values: str, version: str) -> None:
    done = helm.run(*Helm.arguments(values), "--kube-version", version)
    assert done.returncode == 0, done.stderr
    documents = [document for document in yaml.safe_load_all(done.stdout) if document]
    own = [document for document in documents if not document["apiVersion"].startswith("monitoring.coreos.com/")]
    assert len(own) > 5
    for document in own:
        kubernetes_validate.validate(document, version, strict=True)


def test_the_validation_would_notice(helm: Helm) -> None:
    deployment = of_kind(helm.template("minimal"), "Deployment")["r1-rtml-gateway"]
    deployment["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    for version in KUBERNETES:
        with pytest.raises(kubernetes_validate.ValidationError, match="livenesProbe"):
            kubernetes_validate.validate(deployment, version, strict=True)


def test_too_old_a_kubernetes_is_refused(helm: Helm) -> None:
    done = helm.run(*Helm.arguments("minimal"), "--kube-version", "1.26")
    assert (done.returncode, "incompatible with Kubernetes v1.26" in done.stderr) == (1, True), done.stderr


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('keys.existingSecret=""', "keys: pods talk over the network only with keys: rtml keys make"),
        ('keys.data={"client.public":"x"}', "keys.?/?data"),
        ("gateway.apps=[]", "gateway.apps: say what to serve, like --set gateway.apps={shop:app}"),
        ("gateway.ingress.enabled=true", "gateway.ingress.hosts: say for which hosts"),
        ('models.type="hostPath"', "models.hostPath.path: say which directory"),
        ('models.type="s3"', "models.?/?type.*pvc"),
        ("gateway.replica=3", "gateway.*replica"),
        ("gateway.replicas=-1", "gateway.?/?replicas.*0"),
        ("gateway.port=70000", "gateway.?/?port.*65"),
        ("gateway.grpcPort=8000", "gateway.grpcPort: gRPC needs a port of its own"),
        ('poolDefaults.memory="2G"', r"poolDefaults.?/?memory.*Mi\|Gi\|Ti"),
        ('pools={"GPU":{}}', "pools.*GPU"),
        ('pools={"gpu":{"gpus":1}}', "pools.?/?gpu.*gpus"),
        ("dispatcher.limits={\"depth\":3}", "dispatcher.?/?limits.*depth"),
        ('image.digest="latest"', "image.?/?digest.*sha256"),
        ('nameOverride="My_Shop"', r"nameOverride.*pattern '\^"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_refused_by_name(each_helm: Helm, setting: str, message: str) -> None:
    assert re.search(message, each_helm.refuse("minimal", setting))


def test_a_secret_that_lacks_a_key_is_refused(each_helm: Helm) -> None:
    data = yaml.safe_load(VALUES["keys"].read_text())["keys"]["data"]
    del data["node.secret"]
    message = each_helm.refuse("minimal", 'keys.existingSecret=""', f"keys.data={json.dumps(data)}")
    assert "keys.data: node.secret is missing" in message
    assert "keys.clients: keys.data has no carol.public" in each_helm.refuse("keys", 'keys.clients=["carol"]')
    assert "keys.existingSecret or keys.data, not both" in each_helm.refuse("keys", 'keys.existingSecret="other"')


def test_keys_as_the_command_makes_them_are_taken(helm: Helm, tmp_path: Path) -> None:
    for number in range(10):  # all characters of Z85 come up
        data = {Path(path).name: Path(path).read_text() for path in make_keys(str(tmp_path / str(number)))}
        documents = helm.template("keys", f"keys.data={json.dumps(data)}", "keys.clients=[]")
        (secret,) = of_kind(documents, "Secret").values()
        assert data.items() == secret["stringData"].items()


# --- what all pods have -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", VALUES)
def test_pods_can_do_little(rendered: dict[str, list[dict[str, Any]]], values: str) -> None:
    for name, spec in pod_specs(rendered[values]).items():
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, "a Service 'rtml' would set RTML_PORT, which is a setting"
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        for one in spec.get("initContainers", []):
            assert one["securityContext"] == container["securityContext"]
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]
        if name.endswith("-test"):
            continue
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert len(mounts) == len(container["volumeMounts"])
        assert {"/tmp", "/run/rtml", "/etc/rtml/keys"} <= mounts.keys(), "what is written to, and the keys"
        ports = {entry["name"] for entry in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            for kind in container[probe].keys() & {"httpGet", "tcpSocket"}:
                assert container[probe][kind]["port"] in ports


@pytest.mark.parametrize("values", VALUES)
def test_selectors_find_their_pods_and_no_others(rendered: dict[str, list[dict[str, Any]]], values: str) -> None:
    documents = rendered[values]
    labels = {
        name: it["spec"]["template"]["metadata"]["labels"] for name, it in of_kind(documents, "Deployment").items()
    }
    for pod, its in of_kind(documents, "Pod").items():
        labels[pod] = its["metadata"]["labels"]

    def found(selector: dict[str, str]) -> list[str]:
        return sorted(name for name, its in labels.items() if selector.items() <= its.items())

    pools = sorted(name for name in labels if "-pool-" in name)
    for name, deployment in of_kind(documents, "Deployment").items():
        assert found(deployment["spec"]["selector"]["matchLabels"]) == [name]
        for constraint in deployment["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
            assert found(constraint["labelSelector"]["matchLabels"]) == [name]
    for name, budget in of_kind(documents, "PodDisruptionBudget").items():
        assert found(budget["spec"]["selector"]["matchLabels"]) == [name]
    for name, service in of_kind(documents, "Service").items():
        (selected,) = found(service["spec"]["selector"])
        assert selected == (name if name.endswith("-dispatcher") else f"{name}-gateway")
        ports = {port["name"] for port in pod_specs(documents)[selected]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for monitor in of_kind(documents, "PodMonitor").values():
        assert found(monitor["spec"]["selector"]["matchLabels"]) == pools


# --- each part --------------------------------------------------------------------------------------------------------


def test_the_dispatcher_is_one_behind_a_headless_service(rendered: dict[str, list[dict[str, Any]]]) -> None:
    documents = rendered["everything"]
    deployment = of_kind(documents, "Deployment")["shop-dispatcher"]
    assert (deployment["spec"]["replicas"], deployment["spec"]["strategy"]) == (1, {"type": "Recreate"})
    service = of_kind(documents, "Service")["shop-dispatcher"]["spec"]
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    address = "tcp://shop-dispatcher.ns1.svc:7500"
    assert service["ports"][0]["port"] == 7500
    specs = pod_specs(documents)
    assert after(command_of(specs["shop-dispatcher"]), "--listen")[0] == "tcp://0.0.0.0:7500"
    assert after(command_of(specs["shop-gateway"]), "--address") == [address]
    assert after(command_of(specs["shop-pool-policy"]), "--dispatcher") == [address]
    assert {"--depth-max=5000", "--graph-tasks-max=2000000", "--session-grace=2.5"} <= set(
        command_of(specs["shop-dispatcher"])
    )


def test_every_pool_becomes_a_deployment_of_its_own(rendered: dict[str, list[dict[str, Any]]]) -> None:
    deployments = of_kind(rendered["gpu"], "Deployment")
    pools = {name.partition("-pool-")[2]: it for name, it in deployments.items() if "-pool-" in name}
    assert pools.keys() == {"cpu", "gpu-small", "gpu-large"}
    commands = {name: command_of(it["spec"]["template"]["spec"]) for name, it in pools.items()}
    assert {name: after(command, "--cpu") for name, command in commands.items()} == {
        "cpu": ["8"], "gpu-small": ["4"], "gpu-large": ["16"],
    }  # fmt: skip
    assert {name: after(command, "--gpu") for name, command in commands.items()} == {
        "cpu": [], "gpu-small": ["1"], "gpu-large": ["8"],
    }  # fmt: skip
    assert after(commands["cpu"], "--label") == ["zone=a"]
    assert after(commands["gpu-large"], "--label") == ["speed=fast", "zone=b"]
    assert after(commands["gpu-large"], "--resource") == ["licence=2"]
    assert {name: it["spec"]["replicas"] for name, it in pools.items()} == {"cpu": 3, "gpu-small": 2, "gpu-large": 1}
    for name, it in pools.items():
        (container,) = it["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["requests"]["cpu"] == after(commands[name], "--cpu")[0]
        assert "cpu" not in container["resources"]["limits"]
        variables = {entry["name"]: entry for entry in container["env"]}
        assert variables["POD_NAME"]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
        assert after(commands[name], "--name") == ["$(POD_NAME)"]


def test_gpu_pools_get_gpus_and_no_others_do(rendered: dict[str, list[dict[str, Any]]]) -> None:
    specs = pod_specs(rendered["gpu"])
    taint = {"key": GPU, "operator": "Exists", "effect": "NoSchedule"}
    for name, count in {"gpu-small": "1", "gpu-large": "8"}.items():
        spec = specs[f"r1-rtml-pool-{name}"]
        resources = spec["containers"][0]["resources"]
        assert resources["limits"][GPU] == resources["requests"][GPU] == count
        assert taint in spec["tolerations"]
    assert specs["r1-rtml-pool-gpu-small"]["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert specs["r1-rtml-pool-gpu-small"]["runtimeClassName"] == "nvidia"
    assert len(specs["r1-rtml-pool-gpu-large"]["tolerations"]) == 2
    for name in ("r1-rtml-pool-cpu", "r1-rtml-gateway", "r1-rtml-dispatcher"):
        assert GPU not in specs[name]["containers"][0]["resources"]["limits"]
        assert taint not in specs[name].get("tolerations", [])
    # Another vendor's, as a pool said.
    other = pod_specs(rendered["everything"])["shop-pool-policy"]
    assert other["containers"][0]["resources"]["limits"]["amd.com/gpu"] == "1"
    assert other["tolerations"][-1]["key"] == "amd.com/gpu"
    # No gpu to spare for a second pod during an update.
    strategies = {name: it["spec"]["strategy"] for name, it in of_kind(rendered["gpu"], "Deployment").items()}
    assert strategies["r1-rtml-pool-gpu-small"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}
    assert strategies["r1-rtml-pool-cpu"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


@pytest.mark.parametrize("values", VALUES)
def test_the_pods_memory_has_room_for_tasks_and_objects(rendered: dict[str, list[dict[str, Any]]], values: str) -> None:
    for name, spec in pod_specs(rendered[values]).items():
        if "-pool-" not in name:
            continue
        tasks = int(after(command_of(spec), "--memory")[0])
        (shared,) = (volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shared-memory")
        assert shared["medium"] == "Memory"
        mounts = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounts["shared-memory"] == "/dev/shm"
        limit = mebibytes(spec["containers"][0]["resources"]["limits"]["memory"])
        # A memory volume counts as memory of the container.
        assert limit > tasks // MIB + mebibytes(shared["sizeLimit"]), name
        assert tasks % MIB == 0


def test_a_pools_own_values_win_even_when_they_are_nothing(helm: Helm, rendered: Any) -> None:
    everything = rendered["everything"]
    assert of_kind(everything, "Deployment")["shop-pool-simulation"]["spec"]["replicas"] == 0
    assert of_kind(everything, "Deployment")["shop-pool-simulation"]["spec"]["strategy"] == {"type": "Recreate"}
    specs = pod_specs(everything)
    assert "topologySpreadConstraints" not in specs["shop-pool-policy"]
    assert "topologySpreadConstraints" in specs["shop-pool-simulation"]
    resources = specs["shop-pool-policy"]["containers"][0]["resources"]
    assert resources["requests"]["cpu"] == "3"
    assert resources["limits"] == {"memory": "8Gi", "ephemeral-storage": "10Gi", "amd.com/gpu": "1"}
    assert "r1-rtml-pool-gpu-large" not in of_kind(rendered["gpu"], "PodDisruptionBudget")
    assert "shop-pool-cpu" not in of_kind(everything, "Deployment"), "cpu: null removes it"
    assert not [name for name in pod_specs(helm.template("minimal", "pools.cpu=null")) if "-pool-" in name]


def test_models_are_where_they_were_asked_for(helm: Helm, rendered: dict[str, list[dict[str, Any]]]) -> None:
    wanted: dict[str, tuple[str, Any]] = {
        "gpu": ("/models", {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}}),
        "everything": ("/var/models", {"emptyDir": {"sizeLimit": "5Gi"}}),
        "keys": ("/models", {"hostPath": {"path": "/srv/models", "type": "Directory"}}),
    }
    for values, (place, source) in wanted.items():
        assert not of_kind(rendered[values], "PersistentVolumeClaim")
        for name, spec in pod_specs(rendered[values]).items():
            volumes = [volume for volume in spec.get("volumes", []) if volume["name"] == "models"]
            if name.endswith(("-dispatcher", "-test")):
                assert not volumes
                continue
            assert volumes == [{"name": "models", **source}]
            mounts = spec["containers"][0]["volumeMounts"]
            assert {"name": "models", "mountPath": place, "readOnly": True} in mounts
    made = helm.template("minimal", 'models={"type":"pvc","pvc":{"size":"7Gi","storageClassName":"fast"}}')
    claim = of_kind(made, "PersistentVolumeClaim")["r1-rtml-models"]
    assert claim["spec"]["resources"] == {"requests": {"storage": "7Gi"}}
    assert claim["spec"]["storageClassName"] == "fast"
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    volumes = pod_specs(made)["r1-rtml-pool-cpu"]["volumes"]
    assert volumes[-1]["persistentVolumeClaim"]["claimName"] == "r1-rtml-models"


def test_gateways_drain_before_they_are_killed(rendered: dict[str, list[dict[str, Any]]]) -> None:
    for values in VALUES:
        (spec,) = (spec for name, spec in pod_specs(rendered[values]).items() if name.endswith("-gateway"))
        (wait,) = [spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]]
        drain = float(after(command_of(spec), "--drain-timeout")[0])
        assert wait[0] == "sleep"
        assert spec["terminationGracePeriodSeconds"] >= int(wait[1]) + drain + 5
    everything = pod_specs(rendered["everything"])["shop-gateway"]
    assert everything["terminationGracePeriodSeconds"] == 8 + 90 + 10
    assert pod_specs(rendered["everything"])["shop-pool-policy"]["terminationGracePeriodSeconds"] == 300


def test_the_image_is_named_by_tag_or_digest(helm: Helm, rendered: dict[str, list[dict[str, Any]]]) -> None:
    def image(documents: list[dict[str, Any]]) -> str:
        (found,) = {spec["containers"][0]["image"] for spec in pod_specs(documents).values()}
        return str(found)

    application = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert image(rendered["minimal"]) == f"registry.example.com/shop:{application}"
    assert image(rendered["everything"]) == "registry.example.com/shop:v7"
    assert re.fullmatch(r"registry\.example\.com/shop@sha256:[0-9a-f]{64}", image(rendered["gpu"]))


def test_parts_can_be_left_out(helm: Helm) -> None:
    documents = helm.template("minimal", "gateway.enabled=false", "gateway.apps=[]")
    assert pod_specs(documents).keys() == {"r1-rtml-dispatcher", "r1-rtml-pool-cpu"}
    assert of_kind(documents, "Service").keys() == {"r1-rtml-dispatcher"}
    assert not of_kind(helm.template("minimal", "helmTest.enabled=false"), "Pod")
    budgets = of_kind(helm.template("minimal", "gateway.pdb.enabled=false"), "PodDisruptionBudget")
    assert budgets.keys() == {"r1-rtml-pool-cpu"}


def test_monitors_name_ports_and_paths_that_exist(rendered: dict[str, list[dict[str, Any]]]) -> None:
    documents = rendered["everything"]
    (service,) = of_kind(documents, "ServiceMonitor").values()
    (pod,) = of_kind(documents, "PodMonitor").values()
    assert service["metadata"]["labels"]["release"] == pod["metadata"]["labels"]["release"] == "prometheus"
    # No schema of these kinds is at hand: the fields are named here, as misspelt ones would be taken silently.
    assert service["spec"].keys() == {"selector", "endpoints"}
    assert pod["spec"].keys() == {"selector", "podTargetLabels", "podMetricsEndpoints"}
    secure = of_kind(rendered["keys"], "ServiceMonitor")["r1-rtml-gateway"]["spec"]["endpoints"][0]
    assert (secure["scheme"], secure["tlsConfig"]) == ("https", {"insecureSkipVerify": True})
    assert secure["authorization"] == {"credentials": {"name": "shop-metrics", "key": "token"}}
    endpoint = {"path": "/metrics", "interval": "5s", "scrapeTimeout": "4s"}
    assert service["spec"]["endpoints"] == [{"port": "http", **endpoint}]
    assert pod["spec"]["podMetricsEndpoints"] == [{"port": "metrics", **endpoint}]
    selected = of_kind(documents, "Service")["shop"]
    assert service["spec"]["selector"]["matchLabels"].items() <= selected["metadata"]["labels"].items()
    assert "http" in {port["name"] for port in selected["spec"]["ports"]}
    for name, spec in pod_specs(documents).items():
        if "-pool-" in name:
            ports = {port["name"]: port["containerPort"] for port in spec["containers"][0]["ports"]}
            assert after(command_of(spec), "--metrics-port") == [str(ports["metrics"])]
    assert not of_kind(rendered["minimal"], "ServiceMonitor")
    assert not of_kind(rendered["minimal"], "PodMonitor")


def test_the_ingress_leads_to_the_gateway(rendered: dict[str, list[dict[str, Any]]]) -> None:
    (ingress,) = of_kind(rendered["keys"], "Ingress").values()
    assert ingress["spec"]["tls"] == [{"secretName": "shop-tls", "hosts": ["shop.example.com"]}]
    (rule,) = ingress["spec"]["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    assert rule["host"] == "shop.example.com"
    assert backend["port"]["name"] in {
        port["name"] for port in of_kind(rendered["keys"], "Service")[backend["name"]]["spec"]["ports"]
    }
    assert not of_kind(rendered["minimal"], "Ingress")


def test_grpc_has_a_port_in_the_pods_and_in_the_service(rendered: dict[str, list[dict[str, Any]]]) -> None:
    for values, name, port, outside, protocol in (
        ("minimal", "r1-rtml", 8001, 8001, "kubernetes.io/h2c"),
        ("keys", "r1-rtml", 8001, 8001, "https"),
        ("everything", "shop", 8081, 9000, "kubernetes.io/h2c"),
    ):
        (container,) = pod_specs(rendered[values])[f"{name}-gateway"]["containers"]
        assert after(container["args"], "--grpc-port") == [str(port)]
        assert {"name": "grpc", "containerPort": port} in container["ports"]
        ports = {found["name"]: found for found in of_kind(rendered[values], "Service")[name]["spec"]["ports"]}
        assert ports["grpc"] == {"name": "grpc", "port": outside, "targetPort": "grpc", "appProtocol": protocol}
    assert "grpc" not in str(pod_specs(rendered["gpu"])["r1-rtml-gateway"])
    assert "grpc" not in str(of_kind(rendered["gpu"], "Service")["r1-rtml"])


def test_tls_and_tokens_of_the_gateway(rendered: dict[str, list[dict[str, Any]]]) -> None:
    spec = pod_specs(rendered["keys"])["r1-rtml-gateway"]
    (container,) = spec["containers"]
    places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    secrets = {volume["name"]: volume["secret"] for volume in spec["volumes"] if "secret" in volume}
    assert {name: secrets[name]["secretName"] for name in ("tls", "tokens")} == {
        "tls": "shop-tls", "tokens": "shop-tokens",
    }  # fmt: skip
    files = [word.partition("=")[2] for word in container["args"] if "=/etc/rtml/" in word]
    # The names in a Secret of type kubernetes.io/tls.
    assert files == [f"{places['tls']}/tls.crt", f"{places['tls']}/tls.key", f"{places['tokens']}/tokens"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["scheme"] == "HTTPS"
    test = pod_specs(rendered["keys"])["r1-rtml-test"]["containers"][0]
    assert test["args"][3] == "https://r1-rtml.ns1.svc:80"
    assert test["env"] == [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "shop-test", "key": "token"}}}]


def test_only_the_release_reaches_the_dispatcher(rendered: dict[str, list[dict[str, Any]]]) -> None:
    (policy,) = of_kind(rendered["everything"], "NetworkPolicy").values()
    (rule,) = policy["spec"]["ingress"]
    inside, outside = rule["from"]
    for deployment in of_kind(rendered["everything"], "Deployment").values():
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert inside["podSelector"]["matchLabels"].items() <= labels.items()
    assert outside == {"namespaceSelector": {"matchLabels": {"team": "ml"}}}


def test_new_keys_restart_the_pods(helm: Helm) -> None:
    def sums(*settings: str) -> set[str]:
        deployments = of_kind(helm.template("keys", *settings), "Deployment").values()
        return {it["spec"]["template"]["metadata"]["annotations"]["checksum/keys"] for it in deployments}

    other = "a" * 40
    assert len(sums()) == 1
    assert sums() != sums(rf'keys.data.alice\.public="{other}"')


def test_notes_say_how_to_reach_it(helm: Helm) -> None:
    # Only an install shows them, and only the new helm's needs no cluster for that.
    arguments = ["install", "r1", str(CHART), "--namespace", "ns1", "--dry-run=client", f"--values={VALUES['keys']}"]
    done = helm.run(*arguments)
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:\n")[2]
    assert "and to the world: https://shop.example.com" in notes
    assert 'rtml.connect("tcp://r1-rtml-dispatcher.ns1.svc:7411", keys=DIR)' in notes
    assert "served to the cluster: https://r1-rtml.ns1.svc:80" in notes
    assert "helm -n ns1 test r1" in notes
    assert "THERE ARE NO WORKERS" in helm.run(*arguments, "--set", "pools.cpu=null").stdout


def test_there_are_two_helms_and_four_sets_of_values() -> None:
    assert {version.partition(".")[0] for version in SOURCES} == {"3", "4"}
    assert VALUES.keys() == {"everything", "gpu", "keys", "minimal"}
