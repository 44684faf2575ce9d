"""Finding apps by name, and what models say of themselves: `rtml.serving.running`, `rtml.serving.routes`."""

import sys
from pathlib import Path
from typing import Any

import pytest

import rtml
from rtml.onnxfile import ModelInfo, TensorInfo
from rtml.serving import App
from rtml.serving.app import TensorSpec
from rtml.serving.registry import describe
from rtml.serving.running import load_apps


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    return tmp_path


def test_apps_are_found_from_the_current_directory(directory: Path) -> None:
    (directory / "found_app.py").write_text(
        "from rtml.serving import App\napp = App('a')\nclass x:\n    y = App('b')\n"
    )
    assert [app.name for app in load_apps(["found_app", "found_app:app", "found_app:x.y"])] == ["a", "a", "b"]


def test_what_is_no_app_is_told(directory: Path) -> None:
    (directory / "broken_app.py").write_text("app = 3\nimport json\n")
    with pytest.raises(ValueError, match=r"'broken_app' is no rtml\.serving\.App but 3"):
        load_apps(["broken_app"])
    with pytest.raises(ValueError, match="there is no module 'nowhere'"):
        load_apps(["nowhere.inside:app"])


@pytest.mark.parametrize("place", ["", ":", ":app", ".inside:app"])
def test_a_place_without_a_module_is_told(place: str) -> None:
    with pytest.raises(ValueError, match="expected MODULE:APP"):
        load_apps([place])


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("\nraise ValueError('wrong weights')", "ValueError: wrong weights"),
        ("open('/no/such/file')", "FileNotFoundError: .*"),
        ("def (", "SyntaxError: .*"),
    ],
    ids=["dependency", "value", "file", "syntax"],
)
def test_what_a_module_raises_comes_with_its_place(directory: Path, text: str, last: str, request: Any) -> None:
    name = f"raising_app_{request.node.callspec.id}"
    (directory / f"{name}.py").write_text(text + "\n")
    with pytest.raises(ValueError, match=rf"^cannot import '{name}'\n(?s:.*){last}$") as caught:
        load_apps([f"{name}:app"])
    assert f'{name}.py", line {text.count(chr(10)) + 1}' in str(caught.value)
    assert "importlib" not in str(caught.value)


class Knowing(rtml.RemoteFunction[..., object]):
    """A remote function like those of `rtml.model`."""

    def metadata(self) -> ModelInfo:
        inputs = (
            TensorInfo("x", "float32", (-1, 4)),
            TensorInfo("s", "object", None),
            TensorInfo("h", "bfloat16", (2,)),
        )
        return ModelInfo(inputs, (TensorInfo("y", "int64", (-1,)),), {})


def double(x: object) -> object:
    return x


def test_a_model_describes_itself_unless_the_app_does() -> None:
    knowing = Knowing(double, rtml.task(double).defaults)
    app = App("x")
    app.model("all", knowing)
    app.model("some", knowing, outputs=[TensorSpec("z", "FP64", (1,))])
    inputs, outputs, platform = describe(app.models["all"])
    assert list(inputs) == [
        TensorSpec("x", "FP32", (-1, 4)),
        TensorSpec("s", "BYTES", None),
        TensorSpec("h", "BF16", (2,)),
    ]
    assert (list(outputs), platform) == ([TensorSpec("y", "INT64", (-1,))], "onnx")
    assert list(describe(app.models["some"])[1]) == [TensorSpec("z", "FP64", (1,))]


def test_a_model_that_takes_no_tensor_cannot_be_served() -> None:
    class Strange(Knowing):
        def metadata(self) -> ModelInfo:
            return ModelInfo((TensorInfo("map", "", ()),), (), {})

    app = App("x")
    app.model("m", Strange(double, rtml.task(double).defaults))
    with pytest.raises(ValueError, match="'map' is of a type that"):
        describe(app.models["m"])
