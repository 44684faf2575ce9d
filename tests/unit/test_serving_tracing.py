"""`rtml.serving.tracing`: the rules of W3C trace context."""

import re

import pytest

from rtml.serving import tracing

ID, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_a_valid_parent_is_followed_with_a_span_of_our_own() -> None:
    trace = tracing.follow(f"00-{ID}-{SPAN}-01", "vendor=1,other=2")
    assert (trace.id, trace.parent, trace.flags, trace.state) == (ID, SPAN, "01", "vendor=1,other=2")
    assert trace.span != SPAN
    assert re.fullmatch(rf"00-{ID}-[0-9a-f]{{16}}-01", trace.header)
    # Later versions may have more fields, and flags that we do not know.
    later = tracing.follow(f"cc-{ID}-{SPAN}-fe-more")
    assert (later.id, later.flags) == (ID, "00")


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "nonsense",
        f"00-{ID.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{ID}-{'0' * 16}-01",
        f"ff-{ID}-{SPAN}-01",
        f"00-{ID}-{SPAN}-01-more",
        f"00-{ID[:-1]}-{SPAN}-01",
        f"00-{ID}-{SPAN}-1",
        f"00-{ID}-{SPAN}-01" * 100,
    ],
)
def test_an_invalid_parent_begins_a_new_trace(parent: str) -> None:
    trace = tracing.follow(parent, "vendor=1")
    assert trace.id != ID
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", trace.header)
    assert (trace.parent, trace.state) == ("", "")


def test_states_that_could_break_a_header_are_dropped() -> None:
    assert tracing.follow(f"00-{ID}-{SPAN}-01", "a=\r\nb").state == ""
    assert tracing.follow(f"00-{ID}-{SPAN}-01", "a=" + "b" * 600).state == ""
