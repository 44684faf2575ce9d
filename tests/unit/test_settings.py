"""Settings from arguments, environment and defaults, and the command line made of them."""

import argparse
import re

import pytest

from rtml import __main__ as command
from rtml import settings
from rtml.settings import BenchSettings, DispatcherAddress, EngineSettings, HttpSettings, KeySettings

ALL: list[type[settings.Settings]] = [EngineSettings, HttpSettings, DispatcherAddress, KeySettings, BenchSettings]


def parsed(kind: type[settings.Settings], *arguments: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser, kind)
    return vars(parser.parse_args(arguments))


def test_arguments_beat_the_environment_which_beats_defaults() -> None:
    environment = {"RTML_PORT": "81", "RTML_HOST": "0.0.0.0", "PORT": "9"}
    found = settings.load(HttpSettings, parsed(HttpSettings, "--port", "82"), environment)
    assert (found.port, found.host, found.drain_timeout) == (82, "0.0.0.0", 30.0)


def test_lists_booleans_and_optional_numbers() -> None:
    environment = {"RTML_LISTEN": "tcp://a:1, tcp://b:2", "RTML_LOGS": "false", "RTML_WORKERS": "3"}
    found = settings.load(EngineSettings, parsed(EngineSettings), environment)
    assert (found.listen, found.logs, found.workers) == (("tcp://a:1", "tcp://b:2"), False, 3)
    arguments = parsed(
        EngineSettings, "--listen", "tcp://c:3", "--listen", "tcp://d:4", "--logs", "--preimport", "json"
    )
    found = settings.load(EngineSettings, arguments, environment)
    assert (found.listen, found.logs, found.preimport) == (("tcp://c:3", "tcp://d:4"), True, ("json",))
    assert settings.load(EngineSettings, parsed(EngineSettings), {}).workers is None


def test_entries_of_dicts_come_one_at_a_time() -> None:
    environment = {"RTML_LIMITS": "depth_max=7, recovery=0.5", "RTML_RESOURCES": "licence=1"}
    found = settings.load(EngineSettings, parsed(EngineSettings), environment)
    assert (found.limits, found.resources) == ({"depth_max": 7, "recovery": 0.5}, {"licence": 1})
    arguments = parsed(EngineSettings, "--limit", "depth_max=8", "--limit", "inputs_max=9", "--cpu", "2.5")
    found = settings.load(EngineSettings, arguments, environment)
    assert (found.limits, found.resources, found.cpu) == ({"depth_max": 8, "inputs_max": 9}, {"licence": 1}, 2.5)
    assert " limits=depth_max=8,inputs_max=9 " in settings.show(found)
    assert found.for_connect()["limits"] == {"depth_max": 8, "inputs_max": 9}


@pytest.mark.parametrize(
    ("kind", "arguments", "environment", "message"),
    [
        (HttpSettings, ["--port", "70000"], {}, r"--port \(RTML_PORT\): Expected `int` <= 65535"),
        (HttpSettings, [], {"RTML_BODY_MAX": "big"}, r"--body-max \(RTML_BODY_MAX\): Expected `int`"),
        (EngineSettings, ["--link", "tcp"], {}, r"--link \(RTML_LINK\): Invalid enum value 'tcp'"),
        (EngineSettings, ["--workers", "-1"], {}, r"--workers \(RTML_WORKERS\): Expected `int` >= 0"),
        (
            EngineSettings,
            ["--limit", "depth_max"],
            {},
            r"--limit \(RTML_LIMITS\): expected NAME=VALUE, got 'depth_max'",
        ),
        (EngineSettings, [], {"RTML_RESOURCES": "a=x"}, r"--resource \(RTML_RESOURCES\): Expected `float`"),
        (EngineSettings, ["--cpu", "0"], {}, r"--cpu \(RTML_CPU\): Expected `float` > 0"),
        (BenchSettings, ["--seconds", "0"], {}, r"--seconds \(RTML_SECONDS\): Expected `float` > 0"),
    ],
)
def test_values_that_do_not_fit_name_the_option(
    kind: type[settings.Settings], arguments: list[str], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings.load(kind, parsed(kind, *arguments), environment)


def test_what_is_shown_names_every_setting() -> None:
    line = settings.show(HttpSettings(), EngineSettings(listen=("a", "b")))
    assert line.startswith("host=127.0.0.1 port=8000 ")
    assert "workers=- " in line
    assert " listen=a,b " in line


def test_what_an_engine_gets_leaves_out_what_nobody_asked_for() -> None:
    always = {"workers": None, "link": "unix", "async_executors": 1, "logs": True, "blocked_max": 64, "policy": "edf"}
    assert EngineSettings().for_connect() == always
    assert EngineSettings(gpu=1.0, preimport=("json",)).for_connect()["preimport"] == ("json",)


@pytest.mark.parametrize("name", ["serve", "up", "gateway", "dispatcher", "status", "trace", "keys", "bench"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([name, "--help"])
    assert ended.value.code == 0
    assert name in capsys.readouterr().out


def test_every_option_of_every_command_names_its_variable(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ALL:
        parser = argparse.ArgumentParser()
        settings.add_arguments(parser, kind)
        text = " ".join(parser.format_help().split())
        for name in kind.__struct_fields__:
            assert f"RTML_{name.upper()}" in text


def test_the_dispatchers_own_arguments_take_the_environment_too() -> None:
    environment = {"RTML_LISTEN": "unix:/a, tcp://b:1", "RTML_DEPTH_MAX": "9", "RTML_SHM_DIR": ""}
    added = command._dispatcher_arguments(["--shm-dir", "s"], environment)
    assert added[:4] == ["--listen", "unix:/a", "--listen", "tcp://b:1"]
    assert added[-2:] == ["--shm-dir", "s"]
    assert command._dispatcher_arguments(["--listen=x"], environment)[-1:] == ["--listen=x"]
    assert "unix:/a" not in command._dispatcher_arguments(["--listen=x"], environment)


def test_numbers_are_shown_without_exponents(capsys: pytest.CaptureFixture[str]) -> None:
    given = (0, 1.0, 1_000_000, 50_331_648.0, 1e9, 0.25, 0.1, 1e-3, 123456.789)
    shown = [settings.plain(number) for number in given]
    assert shown == ["0", "1", "1000000", "50331648", "1000000000", "0.25", "0.1", "0.001", "123456.789"]
    assert "graph_tasks_max=1000000 " in settings.show(EngineSettings(limits={"graph_tasks_max": 1e6})) + " "
    for name in ("dispatcher", "serve", "worker"):
        with pytest.raises(SystemExit):
            command.main([name, "--help"])
    assert not re.findall(r"default \S*e\+", capsys.readouterr().out)


def test_the_line_at_the_start_has_all_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["serve", "no_such_module:app", "--advertise", "10.0.0.1", "--spill-dir", "/tmp/x"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "data=- advertise=10.0.0.1 object_memory=0 spill_dir=/tmp/x spill_max=0" in printed.out
    assert "rtml serve: there is no module 'no_such_module'" in printed.err


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--depth-max=-1", "at least 1, got '-1'"),
        ("--depth-max=1.5", "whole number"),
        ("--worker-grace=nan", "not negative, got 'nan'"),
        ("--worker-grace=soon", "a number that is not negative"),
    ],
)
def test_the_dispatchers_limits_must_make_sense(option: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["dispatcher", "--listen", "unix:/nowhere/there/is/no/such/directory", option])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"rtml \d+\.\d+\.\d+\n", capsys.readouterr().out)
