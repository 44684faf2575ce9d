"""Makes versions of models stateful: what clients see of them changes, and who runs them."""

from __future__ import annotations

import hashlib
from typing import Any

from rtml.models import Model
from rtml.sequences import Layout
from rtml.serving import descriptions
from rtml.serving.engine import Engine
from rtml.serving.registry import ModelVersion
from rtml.serving.sequences import Family, Stateful
from rtml.serving.sequencespec import SequenceSpec, described, hidden_inputs, layout_of

#: Options of a model's calls that its holders have for life.
_OWN = ("gpu", "memory", "resources")


def of_spec(engine: Engine, version: ModelVersion, spec: SequenceSpec) -> Stateful:
    """Make an app's model stateful.

    Args:
        engine: Will run it.
        version: As a model without state; is changed.
        spec: What the app says.

    Raises:
        ValueError: it is no ONNX model, or the file contradicts what the app says.
    """
    model = getattr(version.function, "function", None)
    if not isinstance(model, Model):
        raise ValueError(f"model {version.name!r}: only models made by rtml.model keep state (sequence=...)")
    layout = layout_of(version.name, spec, model.metadata())
    hidden = hidden_inputs(layout)
    version.inputs = tuple(one for one in version.inputs if one.name not in hidden)
    version.outputs = tuple(one for one in version.outputs if one.name in layout.outputs)
    batch_max = layout.batch if layout.batch > 1 else 0
    version.config = descriptions.describe_config(
        version.name, version.platform, batch_max, version.inputs, version.outputs
    )
    version.config.pop("dynamic_batching", None)
    version.config["sequence_batching"] = described(layout)
    version.batch_max = batch_max
    return make(engine, version, layout, Family())


def make(engine: Engine, version: ModelVersion, layout: Layout, family: Family) -> Stateful:
    """The sequences of a version.

    Args:
        engine: Will run it.
        version: Gets them.
        layout: How it is run.
        family: The model's other versions.
    """
    function: Any = version.function
    # The same model with the same layout has the same holders, whichever gateway process asks for them.
    content = f"{version.prepared.function.id if hasattr(version.prepared.function, 'id') else 0} {_shown(layout)}"
    key = f"{version.name}:{version.version}:{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    defaults = function.defaults
    options = {name: value for name in _OWN if (value := getattr(defaults, name)) is not None}
    version.stateful = stateful = Stateful(function.function, layout, key, engine.host, family, options)
    stateful.version = version
    return stateful


def _shown(layout: Layout) -> str:
    """A text that is equal for equal layouts."""
    states = [(*state[:5], None if state.initial is None else state.initial.tobytes()) for state in layout.states]
    constants = {name: array.tolist() for name, array in layout.constants.items()}
    return repr((states, constants, layout._replace(states=(), constants={})))
