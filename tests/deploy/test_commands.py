"""The pods' commands are those of this very rtml: they parse, they run, and their probes find what they look for."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
import trustme

from rtml import __main__ as command_line
from rtml import dispatcher, settings
from rtml.graph.tables import Limits
from rtml.link.keys import make_keys
from tests.deploy.helm import CHART, VALUES, Helm, after, command_of, pod_specs

APP = "tests.integration.served_app:app"
#: What the values of a command's flags become.
KINDS: dict[str, tuple[type[Any], ...]] = {
    "gateway": (settings.HttpSettings, settings.DispatcherAddress, settings.KeySettings),
    "worker": (settings.NodeSettings, settings.ObjectSettings, settings.KeySettings),
}
ROLES = {"-dispatcher": "dispatcher", "-gateway": "gateway", "-pool-": "worker"}


def role_of(name: str) -> str:
    return next(role for part, role in ROLES.items() if part in name)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


# --- they parse -------------------------------------------------------------------------------------------------------


def parse(command: list[str]) -> None:
    """With the parser of the command line; a flag that it does not know ends the test."""
    program, name, *arguments = command
    assert program == "rtml"
    if name == "dispatcher":
        dispatcher._parser().parse_args(arguments)
        return
    options = vars(command_line._parser().parse_args([name, *arguments]))
    for kind in KINDS.get(name, ()):
        settings.load(kind, options, {})


@pytest.mark.parametrize("values", VALUES)
def test_commands_parse(helm: Helm, values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    for name, spec in pod_specs(helm.template(values)).items():
        if name.endswith("-test"):
            continue
        command = command_of(spec)
        assert command[1] == role_of(name)
        parse(command)
        parsed.append(command[1])
        (container,) = spec["containers"]
        known = set(settings.KeySettings.__struct_fields__)
        if command[1] == "worker":
            known |= {"metrics_host", "drain_timeout"}
        given = {variable["name"] for variable in container["env"] if variable["name"].startswith(settings.PREFIX)}
        assert {name.removeprefix(settings.PREFIX).lower() for name in given} <= known
        probe = container["livenessProbe"].get("exec")
        if probe:
            parse(probe["command"])
    assert set(parsed) == set(ROLES.values())


@pytest.mark.parametrize("name", ["gateway", "dispatcher", "pool-cpu"])
def test_a_renamed_flag_would_be_noticed(helm: Helm, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = pod_specs(helm.template("minimal"))[f"r1-rtml-{name}"]
    with pytest.raises(SystemExit):
        parse([*command_of(spec), "--no-such-flag"])
    assert "--no-such-flag" in capsys.readouterr().err


def test_workers_get_the_flags_that_were_agreed(helm: Helm) -> None:
    flags = {"--dispatcher", "--name", "--cpu", "--gpu", "--memory", "--label", "--resource", "--metrics-port"}
    command = command_of(pod_specs(helm.template("gpu"))["r1-rtml-pool-gpu-large"])
    assert {word for word in command if word.startswith("--")} == flags


def test_the_schema_has_the_dispatchers_limits() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    described = schema["properties"]["dispatcher"]["properties"]["limits"]["properties"]
    whole = {name: kind["type"] == "integer" for name, kind in described.items()}
    wanted = {name: isinstance(value, int) for name, value in Limits()._asdict().items()}
    assert whole == wanted, "change dispatcher.limits in deploy/helm/rtml/values.schema.json"


# --- they run ---------------------------------------------------------------------------------------------------------


class Pod:
    """What a pod runs, as a process of this machine, with its directories in `place`."""

    def __init__(self, spec: dict[str, Any], place: Path, keys: Path, ports: dict[int, int]) -> None:
        self._replaced = {"/run/rtml/": f"{place}/run/", "/etc/rtml/": f"{place}/", "0.0.0.0": "127.0.0.1"}
        for port, real in ports.items():
            self._replaced[f":{port}"] = f":{real}"
        self.container = spec["containers"][0]
        (place / "run").mkdir(parents=True)
        (place / "keys").mkdir()
        (secret,) = (volume["secret"] for volume in spec["volumes"] if volume["name"] == "keys")
        for item in secret["items"]:
            shutil.copy(keys / item["key"], place / "keys" / item["path"])
            (place / "keys" / item["path"]).chmod(secret["defaultMode"])
        self._environment = os.environ | {
            variable["name"]: variable["value"].replace("/etc/rtml", str(place))
            for variable in self.container["env"]
            if "value" in variable and variable["name"] != "HOME"
        }
        self.process: subprocess.Popen[str] | None = None

    def words(self, command: list[str]) -> list[str]:
        """A command of the pod, for this machine."""
        assert command[0] == "rtml"
        found = [sys.executable, "-m", "rtml"]
        for word in command[1:]:
            for old, new in self._replaced.items():
                word = word.replace(old, new)
            found.append(word)
        return found

    def start(self, *more: str, command: list[str] | None = None) -> None:
        words = self.words(command or self.container["args"]) + list(more)
        self.process = subprocess.Popen(words, env=self._environment, text=True)

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.words(command), check=False, capture_output=True, text=True, env=self._environment, timeout=60
        )

    def stop(self) -> int:
        """As Kubernetes does, but for the preStop hook."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


@contextlib.contextmanager
def stopped(pod: Pod) -> Iterator[None]:
    try:
        yield
    finally:
        if pod.process is not None and pod.process.poll() is None:
            pod.stop()


def wait_for(condition: Any) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.05)


def connects(port: int) -> bool:
    """What a tcpSocket probe looks at."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def status(port: int, probe: dict[str, str]) -> int:
    """What an httpGet probe looks at; 0 if nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    if probe["scheme"] == "HTTPS":  # which looks at no certificate
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=ssl._create_unverified_context())
    try:
        connection.request("GET", probe["path"])
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys")
    make_keys(str(directory))
    shutil.copy(directory / "client.public", directory / "alice.public")
    return directory


def test_the_dispatchers_pod(helm: Helm, tmp_path: Path, keys: Path) -> None:
    port = free_port()
    spec = pod_specs(helm.template("minimal", "dispatcher.limits.depth_max=77"))["r1-rtml-dispatcher"]
    pod = Pod(spec, tmp_path, keys, {7411: port})
    assert spec["containers"][0]["startupProbe"]["tcpSocket"] == {"port": "link"}
    liveness = spec["containers"][0]["livenessProbe"]["exec"]["command"]
    assert pod.run(liveness).returncode != 0, "it is not there yet"
    # In a pod, a volume that everybody can write is where the socket's directory is made.
    (tmp_path / "run").chmod(0o777)
    with stopped(pod):
        pod.start()
        wait_for(lambda: connects(port))
        for _ in range(20):  # probes come for ever
            assert connects(port)
        found = pod.run(liveness)
        assert (found.returncode, "peers" in found.stdout) == (0, True), found.stderr
        assert pod.stop() == 0


def make_secrets(place: Path) -> str:
    """What the gateway's Secrets have; returns a token."""
    for name in ("tls", "tokens"):
        (place / name).mkdir()
    certificate = trustme.CA().issue_cert("shop.example.com")
    certificate.private_key_pem.write_to_path(str(place / "tls" / "tls.key"))
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(str(place / "tls" / "tls.crt"), append=True)
    made = subprocess.run(
        [sys.executable, "-m", "rtml", "tokens", "make", "test"], check=True, capture_output=True, text=True
    ).stdout.split("\n")
    (line,) = (line for line in made if line.startswith("sha256:"))
    (place / "tokens" / "tokens").write_text(line + "\n")
    (token,) = (word for line in made for word in line.split() if word.startswith("rtml_"))
    return token


@pytest.mark.parametrize("values", ["minimal", "keys"])
def test_the_gateways_pod_and_the_test_of_the_release(helm: Helm, tmp_path: Path, keys: Path, values: str) -> None:
    link, port = free_port(), free_port()
    ports = (f"gateway.port={port}", f"gateway.grpcPort={free_port()}")
    specs = pod_specs(helm.template(values, *ports, f'gateway.apps=["{APP}"]'))
    pod = Pod(specs["r1-rtml-gateway"], tmp_path / "gateway", keys, {})
    token = {"TOKEN": make_secrets(tmp_path / "gateway")} if values == "keys" else {}
    address = after(command_of(specs["r1-rtml-gateway"]), "--address")[0]
    pod._replaced[address] = f"tcp://127.0.0.1:{link}"
    # For the dispatcher's and the workers' pods stands an engine that listens as they do: with their keys.
    engine = Pod(specs["r1-rtml-dispatcher"], tmp_path / "engine", keys, {7411: link})
    listen = after(command_of(specs["r1-rtml-dispatcher"]), "--listen")[0]
    probes = {name: pod.container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    with stopped(engine), stopped(pod):
        pod.start()
        engine.start(command=["rtml", "up", "--workers", "1", "--port", "0", "--listen", listen])
        for probe in probes.values():
            wait_for(lambda probe=probe: status(port, probe) == 200)
        assert status(port, {**probes["livenessProbe"], "path": "/metrics"}) == 200
        program, flag, script, url, seconds, *request = specs["r1-rtml-test"]["containers"][0]["args"]
        assert (program, flag) == ("python", "-c")

        def test(*request: str) -> subprocess.CompletedProcess[str]:
            words = [sys.executable, flag, script, f"{url.partition(':')[0]}://127.0.0.1:{port}", seconds, *request]
            return subprocess.run(
                words, check=False, capture_output=True, text=True, timeout=60, env=os.environ | token
            )

        found = test(*request)
        assert (found.returncode, "POST /v2/models/spell/infer: {" in found.stdout) == (0, True), found.stderr
        found = test("/v1/sum", '{"numbers": [1, 2, 3]}')
        assert (found.returncode, "'total': 14" in found.stdout) == (0, True), found.stderr
        found = test("/v1/sum", '{"numbers": "none"}')
        assert (found.returncode, "HTTP Error 400" in found.stderr) == (1, True), found.stderr
        if token:
            token["TOKEN"] = "wrong"
            found = test(*request)
            assert (found.returncode, "HTTP Error 401" in found.stderr) == (1, True), found.stderr
        assert pod.stop() == 0
        assert status(port, probes["readinessProbe"]) == 0
        assert engine.stop() == 0


def test_the_pods_of_a_release_together(helm: Helm, tmp_path: Path, keys: Path) -> None:
    link, port, grpc_port, metrics = free_port(), free_port(), free_port(), free_port()
    ports = (f"gateway.port={port}", f"gateway.grpcPort={grpc_port}", f"poolDefaults.metricsPort={metrics}")
    specs = pod_specs(helm.template("minimal", *ports, f'gateway.apps=["{APP}"]'))
    pods = {}
    for name in ("r1-rtml-dispatcher", "r1-rtml-pool-cpu", "r1-rtml-gateway"):
        pods[name] = Pod(specs[name], tmp_path / name, keys, {7411: link})
        pods[name]._replaced |= {"r1-rtml-dispatcher.ns1.svc": "127.0.0.1", "$(POD_NAME)": "r1-rtml-pool-cpu-x1"}
    _, flag, script, _, seconds, *_ = specs["r1-rtml-test"]["containers"][0]["args"]
    with contextlib.ExitStack() as stack:
        for pod in pods.values():
            stack.enter_context(stopped(pod))
            pod.start()
        for name, where in {"r1-rtml-pool-cpu": metrics, "r1-rtml-gateway": port}.items():
            for probe in ("readinessProbe", "livenessProbe"):
                asked = {"scheme": "HTTP", **pods[name].container[probe]["httpGet"]}
                wait_for(lambda where=where, asked=asked: status(where, asked) == 200)
        assert status(metrics, {"scheme": "HTTP", "path": "/metrics"}) == 200
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc_port}") as client:
            assert client.is_server_ready()
        words = [sys.executable, flag, script, f"http://127.0.0.1:{port}", seconds, "/v1/sum", '{"numbers": [1, 2, 3]}']
        found = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
        assert (found.returncode, "'total': 14" in found.stdout) == (0, True), found.stderr
        for name in reversed(pods):
            assert pods[name].stop() == 0, name


def test_the_test_of_the_release_asks_what_it_was_told(helm: Helm) -> None:
    arguments = pod_specs(helm.template("everything"))["shop-test"]["containers"][0]["args"]
    assert arguments[3:5] == ["http://shop.ns1.svc:8000", "60"]
    assert (arguments[5], json.loads(arguments[6])) == ("/v1/price", {"prices": [1, 2.5]})
