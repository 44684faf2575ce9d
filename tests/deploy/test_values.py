"""Three places say which values there are: values.yaml, its schema, and the table of docs/kubernetes.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import yaml

from tests.deploy.helm import CHART, ROOT, VALUES

PAGE = ROOT / "docs" / "kubernetes.md"
BEGIN, END = "<!-- made from values.yaml: pytest tests/deploy/test_values.py --rewrite -->\n", "<!-- end -->\n"


class Value(NamedTuple):
    """One value: its path, its default as JSON, what it is."""

    path: str
    default: str
    meaning: str


def described() -> Iterator[Value]:
    """What values.yaml says: `# -- meaning`, and the key below it."""
    text = (CHART / "values.yaml").read_text()
    values = yaml.safe_load(text)
    parents: list[str] = []
    meaning = ""
    for line in text.splitlines():
        if found := re.fullmatch(r" *# -- (.+)", line):
            meaning = found[1]
        elif found := re.match(r"( *)([A-Za-z]+):", line):
            del parents[len(found[1]) // 2 :]
            parents.append(found[2])
            if meaning:
                value = values
                for name in parents:
                    value = value[name]
                yield Value(".".join(parents), json.dumps(value), meaning)
                meaning = ""


def table() -> str:
    rows = [f"| `{value.path}` | `{value.default}` | {value.meaning} |" for value in described()]
    return "\n".join(["| value | default | meaning |", "|---|---|---|", *rows, ""])


def leaves(values: dict[str, Any], above: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{above}{name}.")
        else:
            yield above + name


def test_every_value_is_described() -> None:
    paths = [value.path for value in described()]
    assert len(set(paths)) == len(paths)
    for leaf in leaves(yaml.safe_load((CHART / "values.yaml").read_text())):
        assert any(leaf == path or leaf.startswith(f"{path}.") for path in paths), f"{leaf} has no `# --`"


def test_the_table_of_the_documents(request: pytest.FixtureRequest) -> None:
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, behind = rest.partition(END)
    new = before + BEGIN + table() + END + behind
    if request.config.getoption("--rewrite"):
        PAGE.write_text(new)
    assert PAGE.read_text() == new, "make it anew with --rewrite"


def test_the_schema_knows_the_same_values() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(values: dict[str, Any], kind: dict[str, Any], where: str) -> None:
        if "$ref" in kind:
            kind = schema["definitions"][kind["$ref"].rpartition("/")[2]]
        if "properties" not in kind:
            assert "patternProperties" in kind or "additionalProperties" in kind or kind in ({}, {"type": "object"}), (
                where
            )
            return
        assert kind["additionalProperties"] is False, f"{where}: a misspelt value would be taken"
        assert kind["properties"].keys() - {"global"} == values.keys(), where
        for name, value in values.items():
            if isinstance(value, dict) and name not in (
                "limits",
                "token",
            ):  # by name: test_commands.py and test_chart.py
                compare(value, kind["properties"][name], f"{where}{name}.")

    compare(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "")


def test_one_set_of_values_says_everything() -> None:
    """So that every value is seen by the validation."""
    given: set[str] = set()
    for path in VALUES.values():
        values = yaml.safe_load(path.read_text())
        for pool in values.pop("pools", {}).values():
            given |= {f"poolDefaults.{leaf}" for leaf in leaves(pool or {})}
        given |= set(leaves(values))
    silent = [
        value.path
        for value in described()
        if value.path not in given and not any(path.startswith(f"{value.path}.") for path in given)
    ]
    # What a cluster's administrator may have to change, and nobody else should; the claim that the chart makes and the
    # overhead are tested in test_chart.py.
    assert set(silent) == {
        "podSecurityContext", "securityContext", "pools", "gateway.enabled", "gateway.pdb.enabled", "helmTest.enabled",
        "models.pvc.size", "models.pvc.storageClassName", "models.pvc.accessModes", "poolDefaults.overhead",
        "poolDefaults.pdb.maxUnavailable",
    }  # fmt: skip
