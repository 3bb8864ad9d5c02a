"""Every way in which a payload can be wrong is refused with an AdapterError that names it."""

import json
import pickle
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from core.errors import AdapterError
from tests.forged_payloads import (
    DATA,
    PAIR,
    VALID,
    A,
    B,
    doubled,
    entry,
    forged,
    framed,
    with_a,
    with_value,
    without,
)
from wire.codec import limits_of, unpack, unpack_delta
from wire.framing import MAX_HEADER_BYTES

DEEP = 100_000
NOT_JSON = "the header is not valid JSON"
BAD_ENTRY = "must have a dtype of F32, BF16, F16, I8, a shape of two sizes"
BAD_SCALE = "the scale of module 'q' must be a number; got"
HALF_MISSING = "module 'q': must come with both lora_A and lora_B"
HUGE = 10**4000

MALFORMED: dict[str, tuple[bytes, str]] = {
    # the frame
    "empty": (b"", "at least 8 bytes; got 0"),
    "seven bytes": (b"\0" * 7, "at least 8 bytes; got 7"),
    "header of no length": (b"\0" * 8, NOT_JSON),
    "length one too long": (
        len(VALID[8:] + b"x").to_bytes(8, "little") + VALID[8:],
        f"the header claims {len(VALID) - 7} bytes, but {len(VALID) - 8} follow",
    ),
    "length 2**63": ((2**63).to_bytes(8, "little") + VALID[8:], f"claims {2**63} bytes"),
    "length 2**64 - 1": (b"\xff" * 8 + VALID[8:], f"claims {2**64 - 1} bytes"),
    "a pickle": (pickle.dumps({"q": [1.0] * 99}), "truncated or not an adapter"),
    "a zip": (b"PK\x03\x04" + b"\0" * 99, NOT_JSON + "|truncated or not an adapter"),
    # the header
    "not UTF-8": (framed(b'{"\xff": 1}'), NOT_JSON + r".*utf-8"),
    "no JSON": (framed(b"adapter!"), NOT_JSON + ".*Expecting value"),
    "cut JSON": (framed(b'{"q.lora_A": {'), NOT_JSON),
    "an array": (framed(b"[1, 2]"), "the header must be a JSON object; got list"),
    "a number": (framed(b"7"), "the header must be a JSON object; got int"),
    "deep arrays": (framed(b"[" * DEEP), NOT_JSON + ".*recursion"),
    "deep objects": (framed(b'{"a":' * DEEP), NOT_JSON + ".*recursion"),
    "deep, closed": (framed(b"[" * DEEP + b"]" * DEEP), NOT_JSON + ".*recursion"),
    "5000 digits": (framed(b'{"a": 1' + b"0" * 5000 + b"}"), NOT_JSON + ".*4300 digits"),
    "name twice": (doubled("q.lora_A"), NOT_JSON + ".*a name stands twice"),
    "metadata twice": (doubled("__metadata__"), NOT_JSON + ".*a name stands twice"),
    # the metadata
    "no metadata": (framed(json.dumps(PAIR).encode()), "expected .* format bouquet-adapter-1"),
    "metadata a list": (framed(b'{"__metadata__": []}'), "expected .* format bouquet-adapter-1"),
    "no format": (forged(format=None), "expected .* format bouquet-adapter-1"),
    "another format": (forged(format="pt"), "expected .* format bouquet-adapter-1"),
    "no hash": (forged(sha256=None), "does not match the SHA-256"),
    "wrong hash": (forged(sha256="0" * 64), "does not match the SHA-256"),
    "hash a list": (forged(sha256=[1]), "does not match the SHA-256"),
    "changed data": (VALID[:-1] + bytes([VALID[-1] ^ 1]), "does not match the SHA-256"),
    # the scales
    "no scales": (forged(scales=None), "the scales is not valid JSON"),
    "scales a list": (
        forged(scales="[1]"),
        "the scales must be one number or a JSON object; got list",
    ),
    "scales no JSON": (forged(scales="{q: 1}"), "the scales is not valid JSON"),
    "scales deep": (forged(scales="[" * DEEP), "the scales is not valid JSON.*recursion"),
    "scales deep inside": (forged(scales='{"q":' * DEEP), "the scales is not valid JSON.*recurs"),
    "scale twice": (forged(scales='{"q": 1, "q": 2}'), "scales is not valid JSON.*stands twice"),
    "scale NaN": (forged(scales='{"q": NaN}'), "module 'q': the scale .* finite; got nan"),
    "scale Infinity": (forged(scales='{"q": Infinity}'), "module 'q': .* finite; got inf"),
    "scale -Infinity": (forged(scales='{"q": -Infinity}'), "module 'q': .* finite; got -inf"),
    "scale 1e400": (forged(scales='{"q": 1e400}'), "module 'q': .* finite; got inf"),
    "scale 10**4000": (forged(scales='{"q": ' + str(HUGE) + "}"), "module 'q': int too large"),
    "scale a string": (forged(scales='{"q": "0.5"}'), BAD_SCALE + " '0.5'"),
    "scale true": (forged(scales='{"q": true}'), BAD_SCALE + " True"),
    "scale null": (forged(scales='{"q": null}'), BAD_SCALE + " None"),
    "scale a list": (forged(scales='{"q": [1.0]}'), BAD_SCALE + r" \[1\.0\]"),
    "no modules": (forged({}, b"", "{}"), "no module in this adapter: its header names no scale"),
    "tensors without scales": (forged(scales="{}"), "no module in this adapter"),
    # which tensors there are
    "no A": (forged({"q.lora_B": entry([4, 1], 0, 16)}, DATA[:16]), HALF_MISSING),
    "no B": (forged({"q.lora_A": A}, DATA[:8]), HALF_MISSING),
    "no such module": (forged(scales='{"q": 1, "k": 1}'), "module 'k': must come with both"),
    "extra tensor": (
        forged({**PAIR, "head": entry([0, 1], 24, 24)}),
        "tensor 'head' belongs to no module with a scale",
    ),
    "extra half": (
        forged({**PAIR, "k.lora_A": entry([0, 1], 24, 24)}),
        "tensor 'k.lora_A' belongs to no module with a scale",
    ),
    "a dense module": (
        forged({"q.delta": entry([3, 2], 0, 24)}),
        "tensor 'q.delta' is a dense delta, where factors were expected",
    ),
    "a dense module beside factors": (
        forged({**PAIR, "q.delta": entry([1, 2], 24, 24)}),
        "tensor 'q.delta' is a dense delta, where factors were expected",
    ),
    # what an entry claims
    "entry null": (forged({**PAIR, "q.lora_A": None}), BAD_ENTRY),
    "entry a list": (forged({**PAIR, "q.lora_A": [1, 2]}), BAD_ENTRY),
    "no dtype": (without("dtype"), BAD_ENTRY),
    "no shape": (without("shape"), BAD_ENTRY),
    "no offsets": (without("data_offsets"), BAD_ENTRY),
    "dtype F64": (with_a(dtype="F64"), BAD_ENTRY + ".*F64"),
    "dtype f32": (with_a(dtype="f32"), BAD_ENTRY),
    "dtype a list": (with_a(dtype=["F32"]), BAD_ENTRY),
    "dtype null": (with_a(dtype=None), BAD_ENTRY),
    "0-D": (with_a([]), BAD_ENTRY),
    "1-D": (with_a([2]), BAD_ENTRY),
    "3-D": (with_a([1, 2, 1]), BAD_ENTRY),
    "shape a string": (with_a("12"), BAD_ENTRY),
    "shape of strings": (with_a(["1", "2"]), BAD_ENTRY),
    "shape of floats": (with_a([1.0, 2.0]), BAD_ENTRY),
    "shape of booleans": (with_a([True, 2]), BAD_ENTRY),
    "shape NaN": (with_a([float("nan"), 2]), BAD_ENTRY),
    "negative sizes": (with_a([-1, -2]), BAD_ENTRY),
    "size 2**31": (with_a([0, 2**31], 0, 0), BAD_ENTRY),
    "size 2**63 - 1, no rows": (with_a([0, 2**63 - 1], 0, 0), BAD_ENTRY),
    "size 10**4000, no rows": (with_a([0, HUGE], 0, 0), BAD_ENTRY),
    "size 10**4000 squared": (with_a([HUGE, HUGE]), BAD_ENTRY),
    "three offsets": (forged({**PAIR, "q.lora_A": {**A, "data_offsets": [0, 8, 8]}}), BAD_ENTRY),
    "offsets of floats": (with_a(begin=0.0), BAD_ENTRY),
    "offsets of booleans": (with_a(begin=False), BAD_ENTRY),
    "offsets of strings": (with_a(end="8"), BAD_ENTRY),
    # where it says the tensor lies
    "largest sizes": (with_a([2**31 - 1] * 2), "should lie at bytes 0 to 18446744056529682436 of"),
    "offset -8": (with_a(begin=-8, end=0), "should lie at bytes 0 to 8 of 24; .* says -8 to 0"),
    "offset 10**4000": (with_a(end=HUGE), "should lie at bytes 0 to 8 of 24; .* says 0 to 1000"),
    "backwards": (with_a(begin=8, end=0), "should lie at bytes 0 to 8 of 24; .* says 8 to 0"),
    "shape too small": (with_a([1, 1]), "should lie at bytes 0 to 4 of 24; .* says 0 to 8"),
    "half the width": (with_a(dtype="BF16"), "should lie at bytes 0 to 4 of 24"),
    "gap at the start": (with_a(begin=4, end=12), "should lie at bytes 0 to 8"),
    "gap between": (
        forged({**PAIR, "q.lora_B": entry([3, 1], 12, 24)}),
        "tensor 'q.lora_B' of shape .* should lie at bytes 8 to 20 of 24; .* says 12 to 24",
    ),
    "overlap": (
        forged({**PAIR, "q.lora_B": entry([4, 1], 0, 16)}),
        "tensor 'q.lora_B' of shape .* should lie at bytes 8 to 24 of 24; .* says 0 to 16",
    ),
    "the same bytes twice": (
        forged({"q.lora_A": entry([1, 4], 0, 16), "q.lora_B": entry([4, 1], 0, 16)}, DATA[:16]),
        "tensor 'q.lora_B' of shape .* should lie at bytes 16 to 32 of 16",
    ),
    "past the end": (
        forged({**PAIR, "q.lora_B": entry([5, 1], 8, 28)}),
        "should lie at bytes 8 to 28 of 24",
    ),
    "trailing bytes": (
        forged({**PAIR, "q.lora_B": entry([3, 1], 8, 20)}),
        "4 bytes follow the last tensor",
    ),
    "ranks differ": (
        forged({"q.lora_A": A, "q.lora_B": entry([2, 2], 8, 24)}),
        r"module 'q': factors must be A \(r, n\).*got A \(1, 2\) and B \(2, 2\)",
    ),
    # the numbers
    "NaN": (with_value(0x7FC00000), "tensor 'q.lora_B' holds values that are not finite"),
    "signalling NaN": (with_value(0xFF800001), "'q.lora_B' holds values that are not finite"),
    "infinity": (with_value(0x7F800000), "'q.lora_B' holds values that are not finite"),
    "-infinity": (with_value(0xFF800000), "'q.lora_B' holds values that are not finite"),
    "bfloat16 NaN": (
        forged({"q.lora_A": entry([1, 1], 0, 2, "BF16")}, b"\xc0\x7f"),
        "tensor 'q.lora_A' holds values that are not finite",
    ),
    "float16 infinity": (
        forged({"q.lora_A": entry([1, 1], 0, 2, "F16")}, b"\0\x7c"),
        "tensor 'q.lora_A' holds values that are not finite",
    ),
}


@pytest.mark.parametrize(("payload", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_bytes_are_refused_with_their_reason(payload: bytes, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        unpack(payload)


MALFORMED_DELTAS: dict[str, tuple[bytes, str]] = {
    "a scale": (
        forged({"q.delta": entry([3, 2], 0, 24)}, scales='{"q": 0.5}'),
        "module 'q' is dense and its scale must be 1; got 0.5",
    ),
    "factors too": (
        forged({**PAIR, "q.delta": entry([0, 2], 24, 24)}, scales='{"q": 1.0}'),
        "tensor 'q.lora_A' belongs to no module with a scale",
    ),
    "no module of this name": (
        forged({"q.delta": entry([3, 2], 0, 24)}, scales='{"k": 1.0}'),
        "module 'k': must come with both lora_A and lora_B",
    ),
    "NaN": (
        forged({"q.delta": entry([1, 1], 0, 4)}, b"\0\0\xc0\x7f", scales='{"q": 1.0}'),
        "tensor 'q.delta' holds values that are not finite",
    ),
}


@pytest.mark.parametrize(
    ("payload", "message"), MALFORMED_DELTAS.values(), ids=MALFORMED_DELTAS.keys()
)
def test_a_malformed_dense_module_is_refused_with_its_reason(payload: bytes, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        unpack_delta(payload)


def test_the_forged_payload_is_valid_until_something_in_it_is_changed() -> None:
    factors = unpack(forged())["q"]
    assert (factors.shape, factors.rank, factors.scale) == ((4, 2), 1, 0.5)
    assert factors.a.tolist() == [[0.0, 1.0]]
    assert with_a() == forged()
    assert with_value(0x40400000) == forged()


def test_a_payload_cut_anywhere_is_refused() -> None:
    for length in range(len(VALID)):
        with pytest.raises(AdapterError, match=r"8 bytes|truncated|SHA-256"):
            unpack(VALID[:length])


@pytest.mark.parametrize("extra", [b"\0", b" ", b"\0" * 8, VALID])
def test_bytes_behind_the_end_are_refused(extra: bytes) -> None:
    with pytest.raises(AdapterError, match="SHA-256"):
        unpack(VALID + extra)


def test_a_header_over_the_limit_is_refused_before_it_is_read() -> None:
    length = MAX_HEADER_BYTES + 1
    with pytest.raises(AdapterError, match=f"the header claims {length} bytes"):
        unpack(length.to_bytes(8, "little") + bytes(length))


@pytest.mark.parametrize("name", ["x" * 100_000, "\ud800", "a\nb", "\x1b[2J"])
def test_a_message_shows_a_strangers_name_quoted_and_cut(name: str) -> None:
    names = json.dumps({name: 1.0})
    wrong = json.dumps({name: []})
    entries = {f"{name}.lora_A": A, f"{name}.lora_B": B}
    for payload in (
        forged(scales=names),
        forged(entries, scales=wrong),
        forged(entries, scales=names.replace("1.0", "NaN")),
        forged({**PAIR, f"{name}.lora_A": entry([0, 1], 24, 24)}),
        forged({f"{name}.lora_A": None}),
        forged({f"{name}.lora_A": entry([1, 2], 8, 16)}),
    ):
        with pytest.raises(AdapterError) as raised:
            unpack(payload)
        assert len(str(raised.value)) < 800
        assert str(raised.value).isprintable()


@contextmanager
def at_recursion_depth(spare: int) -> Iterator[None]:
    """Run with only about `spare` frames left, as deep inside a server's call stack."""
    before, depth, frame = sys.getrecursionlimit(), 0, sys._getframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back  # type: ignore[assignment]
    sys.setrecursionlimit(depth + spare)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def test_nesting_just_within_the_parsers_limit_is_refused_too() -> None:
    for depth in range(10, 180):
        nested = "[" * depth + "]" * depth
        header = json.dumps({"t": 0, "__metadata__": {"format": "bouquet-adapter-1"}})
        payloads = [
            forged(scales='{"q": ' + nested + "}"),
            framed(header.replace("0", nested).encode()),
            framed(header.replace("}}", f', "scales": {nested}}}}}').encode()),
            forged({"t": json.loads(nested)}),
        ]
        for payload in payloads:
            with at_recursion_depth(150), pytest.raises(AdapterError):
                unpack(payload)


@pytest.mark.parametrize(
    "payload",
    [
        with_a([2**31 - 1, 2**31 - 1]),
        with_a([2**31 - 1, 1], 0, 4 * (2**31 - 1)),
        with_a([0, 2**31 - 1], 0, 0),
        VALID[:8] + VALID[8:].replace(b"[2,2]", b"[9999999999,9]"),
        (2**62).to_bytes(8, "little") + VALID[8:],
    ],
)
def test_claims_of_huge_shapes_allocate_nothing(payload: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError):
            unpack(payload)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_a_wide_module_of_rank_0_is_accepted_and_allocates_nothing() -> None:
    wide = 2**31 - 1
    entries = {"q.lora_A": entry([0, wide], 0, 0), "q.lora_B": entry([wide, 0], 0, 0)}
    assert unpack(forged(entries, b""))["q"].shape == (wide, wide)


def test_more_than_the_limits_allow_is_refused_before_it_is_read() -> None:
    allowed = limits_of({"q": (4, 2), "v": (3, 5)}, rank=2)
    assert unpack(VALID, limits=allowed).rank == 2
    length = int.from_bytes(VALID[:8], "little")
    with pytest.raises(AdapterError, match=f"claims {length} bytes, where at most 10 can be need"):
        unpack(VALID, limits=replace(allowed, header_bytes=10))
    with pytest.raises(AdapterError, match=r"'v.lora_B' of shape \[3, 2\] goes beyond the 27 val"):
        unpack(VALID, limits=replace(allowed, values=27))
    with pytest.raises(AdapterError, match=r"'q\.lora_B' came where lora_A alone was asked for"):
        unpack(VALID, limits=replace(allowed, factors="A"))
