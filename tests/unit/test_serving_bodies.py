"""Compressed bodies: whole, bounded, or refused."""

from __future__ import annotations

import gzip
import random
import tracemalloc
import zlib

import pytest

from rtml.serving.bodies import accepted, compress, decompress

TEXT = b"as it was " * 50
RAW = zlib.compress(TEXT)[2:-4]


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(TEXT)),
        ("gzip", gzip.compress(TEXT[:100]) + gzip.compress(b"") + gzip.compress(TEXT[100:])),
        ("deflate", zlib.compress(TEXT)),
        ("deflate", RAW),
        ("identity", TEXT),
    ],
    ids=["gzip", "members", "zlib", "raw", "identity"],
)
def test_what_was_compressed_comes_back(encoding: str, body: bytes) -> None:
    assert decompress(encoding, body, len(TEXT)) == TEXT


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_nothing_that_is_cut_off_passes(encoding: str) -> None:
    whole = gzip.compress(TEXT) if encoding == "gzip" else zlib.compress(TEXT)
    for end in range(len(whole)):
        with pytest.raises(ValueError, match=f"the body is no (whole )?{encoding}"):
            decompress(encoding, whole[:end], 1 << 20)


def test_members_of_gzip_are_not_many_more_than_needed() -> None:
    empty = gzip.compress(b"")
    assert decompress("gzip", empty * 17, 4096) == b""
    with pytest.raises(ValueError, match="more than 17 members"):
        decompress("gzip", empty * 19, 4096)
    parts = [gzip.compress(random.Random(seed).randbytes(5000)) for seed in range(300)]  # pieces end within members
    assert decompress("gzip", b"".join(parts), 2_000_000) == b"".join(map(gzip.decompress, parts))


def test_damage_and_what_follows() -> None:
    for encoding, body in (("gzip", gzip.compress(TEXT)), ("deflate", zlib.compress(TEXT))):
        with pytest.raises(ValueError, match="the body is no"):
            decompress(encoding, body[:-3] + b"\0\0\0", 1 << 20)
        with pytest.raises(ValueError, match=r"the body is no|follow"):
            decompress(encoding, body + b"junk", 1 << 20)


def test_a_bomb_takes_no_more_memory_than_allowed() -> None:
    bomb = gzip.compress(bytes(1 << 26))
    tracemalloc.start()
    try:
        assert decompress("gzip", bomb, 1 << 20) is None
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert decompress("gzip", gzip.compress(TEXT) * 3, len(TEXT) * 3 - 1) is None
    assert decompress("gzip", gzip.compress(TEXT) * 3, len(TEXT) * 3) == TEXT * 3


@pytest.mark.parametrize(
    ("header", "encoding"),
    [
        ("", ""),
        ("gzip", "gzip"),
        ("GZIP;q=0.5", "gzip"),
        ("deflate, gzip;q=0.5", "deflate"),
        ("gzip;q=0, deflate;q=0.1", "deflate"),
        ("gzip;q=0", ""),
        ("br, zstd", ""),
        ("*", "gzip"),
        ("identity", ""),
        ("gzip;q=much, deflate", "deflate"),
        ("gzip;q=nan", ""),
        (";;,,=;q=", ""),
        ("gzip," * 10_000, "gzip"),
    ],
)
def test_how_a_client_wants_its_answer(header: str, encoding: str) -> None:
    assert accepted(header) == encoding


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_answers_shrink_or_stay(encoding: str) -> None:
    unpack = gzip.decompress if encoding == "gzip" else zlib.decompress
    packed = compress(encoding, [TEXT, memoryview(TEXT), b""])
    assert packed is not None
    assert len(packed) < len(TEXT)
    assert unpack(packed) == TEXT + TEXT
    noise = random.Random(0).randbytes(100_000)
    assert compress(encoding, [b"head", noise]) is None
    assert compress(encoding, [noise[:2000]]) is None
