"""Everything a bad client was ever seen or imagined to answer: one table, used by every test of it.

A row is what spoils an honest reply, and a pattern that the reason of its refusal must match.
"""

import json
import pickle

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict

from adapters.adapter import Adapter, Factors
from adapters.algebra import truncate
from tests.forged_payloads import framed
from tests.server.spoiling import (
    DEEP,
    Bad,
    adapter,
    all_in,
    another_round,
    array,
    broadcastable,
    claim,
    cut,
    dense_first,
    doubled,
    emptied,
    first_factors,
    header,
    header_end,
    huge_header,
    in_place_of,
    inflated_int8,
    lacking_metric,
    metric,
    of_rank,
    payload,
    record,
    scale,
    shifted,
    stamp,
    swapped,
    transposed,
    value,
    with_rank,
    without,
)

TOO_MUCH = "bytes came where at most|goes beyond the"
BAD_ENTRY = "must have a dtype of F32, BF16, F16, I8, a shape of two sizes"
OTHER_SHAPES = "modules or shapes differ from the base model's"
OTHER_RANK = "has rank [0-9]+; this client's is [0-9]+"
NOT_FINITE = "holds values that are not finite"
NOT_A_COUNT = "num-examples must be a whole number from 10 to 1,000,000,000; got"
MISSING = "num-examples is missing"
PLACE = "should lie at bytes"
NO_ADAPTER = "expected an ArrayRecord with the one array 'packed'"
TRUNCATED = "truncated or not an adapter|at least 8 bytes|does not match the SHA-256"

MALFORMED_REPLIES: dict[str, tuple[Bad, str]] = {
    # numbers
    "NaN": (value(np.nan), NOT_FINITE),
    "infinity": (value(np.inf), NOT_FINITE),
    "-infinity": (value(-np.inf), NOT_FINITE),
    "1e30": (value(1e30), "holds 1e\\+30; trained factors stay below"),
    "-1e30": (value(-1e30), "holds 1e\\+30; trained factors stay below"),
    # how many examples
    "negative examples": (metric("num-examples", -3), NOT_A_COUNT),
    "zero examples": (metric("num-examples", 0), NOT_A_COUNT),
    "too many examples": (metric("num-examples", 10**12), NOT_A_COUNT),
    "2**63 - 1 examples": (metric("num-examples", 2**63 - 1), NOT_A_COUNT),
    "NaN examples": (metric("num-examples", np.nan), NOT_A_COUNT),
    "infinite examples": (metric("num-examples", np.inf), NOT_A_COUNT),
    "half an example": (metric("num-examples", 0.5), NOT_A_COUNT),
    "a list of examples": (metric("num-examples", [5]), NOT_A_COUNT),
    "examples as text": (
        record("metrics", ConfigRecord({"num-examples": "ten"})),
        "expected a MetricRecord 'metrics'; got ConfigRecord",
    ),
    "no number of examples": (lacking_metric("num-examples"), MISSING),
    # other metrics
    "infinite loss": (
        metric("loss", np.inf),
        "loss must be a finite number from 0 to 10000; got inf",
    ),
    "1e300 tokens": (
        metric("tokens", 1e300),
        "tokens must be a whole number from 0 to 1,000,000,000,000; got 1e.300",
    ),
    "negative tokens": (
        metric("tokens", -100),
        "tokens must be a whole number from 0 .*; got -100",
    ),
    "negative examples seen": (
        metric("examples-seen", -1),
        "examples-seen must be a whole number from 0 .*; got -1",
    ),
    "negative seconds": (
        metric("seconds", -0.5),
        "seconds must be a finite number from 0 .*; got -0.5",
    ),
    "list metric": (metric("loss", [1.0, 2.0]), "loss must be a finite number .*; got a list of 2"),
    "no metrics": (without("metrics"), "expected a MetricRecord 'metrics'; got nothing"),
    "metrics as arrays": (
        record("metrics", ArrayRecord()),
        "a MetricRecord 'metrics'; got ArrayRecord",
    ),
    "empty metrics": (record("metrics", MetricRecord()), MISSING),
    # modules
    "wrong names": (
        adapter(lambda x: Adapter({f"{name}.x": f for name, f in x.items()})),
        OTHER_SHAPES,
    ),
    "a name of control characters": (
        adapter(lambda x: Adapter({f"\x1b[2J{name}\n": f for name, f in x.items()})),
        OTHER_SHAPES,
    ),
    "a missing module": (adapter(lambda x: Adapter(dict(list(x.items())[1:]))), OTHER_SHAPES),
    "an extra module": (
        adapter(lambda x: Adapter({**x, "extra": with_rank(next(iter(x.values())), 1)})),
        f"{OTHER_SHAPES}|{TOO_MUCH}",
    ),
    "an extra module of no size": (
        adapter(
            lambda x: Adapter(
                {**x, "": Factors(np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32), 1.0)}
            )
        ),
        OTHER_SHAPES,
    ),
    "no modules": (header(emptied), "no module in this adapter"),
    # ranks
    "rank too low": (
        adapter(lambda x: truncate(x, x.rank - 1)),
        OTHER_RANK,
    ),
    "rank too high": (adapter(of_rank(lambda rank: rank + 1)), TOO_MUCH),
    "rank far above the limit": (adapter(of_rank(lambda rank: 20 * rank)), TOO_MUCH),
    "rank zero": (adapter(of_rank(lambda rank: 0)), OTHER_RANK),
    "ranks that differ": (
        first_factors(lambda f: with_rank(f, f.rank - 1)),
        OTHER_RANK,
    ),
    # shapes
    "A and B swapped": (
        adapter(lambda x: Adapter({name: swapped(f) for name, f in x.items()})),
        OTHER_SHAPES,
    ),
    "transposed factors": (header(transposed), "factors must be A|has rank"),
    "one number for A": (broadcastable(1, 1), "factors must be A .r, n.|has rank 1"),
    "a vector of one number for A": (broadcastable(1), BAD_ENTRY),
    "a number without dimension for A": (broadcastable(), BAD_ENTRY),
    # formats
    "float64": (all_in("F64", 8), f"{BAD_ENTRY}|{TOO_MUCH}"),
    "int32": (all_in("I32", 4), BAD_ENTRY),
    "uint8": (all_in("U8", 1), BAD_ENTRY),
    "complex": (all_in("C64", 8), f"{BAD_ENTRY}|{TOO_MUCH}"),
    "bool": (all_in("BOOL", 1), BAD_ENTRY),
    "text": (claim(dtype="string"), BAD_ENTRY),
    "a format that is a list": (claim(dtype=["F32"]), BAD_ENTRY),
    "int8 without scales": (all_in("I8", 1), "in I8 must be followed by its .scales"),
    "int8 that inflates": (payload(inflated_int8), TOO_MUCH),
    "an array of float64": (array(dtype="float64"), "expected uint8 bytes"),
    "an array of int32": (array(dtype="int32"), "expected uint8 bytes"),
    "an array of complex64": (array(dtype="complex64"), "expected uint8 bytes"),
    "an array of text": (array(dtype="<U1"), "expected uint8 bytes"),
    "an array of bool": (array(dtype="bool"), "expected uint8 bytes"),
    "an array of another kind": (array(stype="numpy.ndarray"), "expected uint8 bytes"),
    "an array that lies of its shape": (array(shape=(2**60,)), "came under a shape of"),
    "an array without dimension": (array(shape=()), "came under a shape of"),
    "an array per tensor": (
        record("adapter", ArrayRecord([np.ones(3, np.float32), np.ones(3, np.float32)])),
        NO_ADAPTER,
    ),
    # scales
    "scale zero": (scale(0.0), "has scale 0; expected"),
    "scale negative": (scale(-1.0), "has scale -1; expected"),
    "scale NaN": (scale(np.nan), "scale of factors must be finite; got nan"),
    "scale infinite": (scale(np.inf), "scale of factors must be finite; got inf"),
    "scale huge": (scale(1e9), "has scale 1e\\+09; expected"),
    "scale text": (scale({"q": "2"}), "must be a number|module 'q'"),
    "scale missing": (scale({}), "no module in this adapter"),
    # bytes
    "no bytes": (cut(lambda packed: 0), TRUNCATED),
    "seven bytes": (cut(lambda packed: 7), TRUNCATED),
    "the length alone": (cut(lambda packed: 8), TRUNCATED),
    "half a header": (cut(lambda packed: header_end(packed) // 2), TRUNCATED),
    "the header alone": (cut(header_end), TRUNCATED),
    "half the data": (cut(lambda packed: (header_end(packed) + len(packed)) // 2), TRUNCATED),
    "one byte less": (cut(lambda packed: len(packed) - 1), TRUNCATED),
    "trailing bytes": (payload(lambda packed: packed + b"\0" * 8), f"SHA-256|{TOO_MUCH}"),
    "trailing bytes under a true hash": (
        header(lambda entries, data: data + b"\0" * 8),
        f"8 bytes follow the last tensor|{TOO_MUCH}",
    ),
    "far too many bytes": (payload(lambda packed: packed * 100), "bytes came where at most"),
    "a changed byte": (
        payload(lambda packed: packed[:-1] + bytes([packed[-1] ^ 1])),
        "does not match the SHA-256",
    ),
    "a pickle": (
        payload(lambda packed: pickle.dumps({"q": [1.0] * 99})),
        "truncated or not an adapter",
    ),
    "a pickle's head": (
        payload(lambda packed: in_place_of(packed, b"\x80\x04\x95\x10\0\0\0\0")),
        "truncated or not an adapter|JSON",
    ),
    "a zip": (
        payload(lambda packed: in_place_of(packed, b"PK\x03\x04\x00\x00\x08\x08")),
        "truncated or not an adapter|JSON",
    ),
    # headers
    "length 2**60": (
        payload(lambda packed: in_place_of(packed, (2**60).to_bytes(8, "little"))),
        "the header claims 1152921504606846976 bytes",
    ),
    "length negative": (
        payload(lambda packed: in_place_of(packed, (-8).to_bytes(8, "little", signed=True))),
        "truncated or not an adapter",
    ),
    "shape 2**60": (claim(shape=[2**60, 1]), BAD_ENTRY),
    "shape 2**31 - 1 squared": (claim(shape=[2**31 - 1] * 2), TOO_MUCH),
    "shape negative": (claim(shape=[-1, -2]), BAD_ENTRY),
    "shape of fractions": (claim(shape=[1.5, 2.0]), BAD_ENTRY),
    "offsets to 2**60": (claim(data_offsets=[0, 2**60]), PLACE),
    "offsets negative": (claim(data_offsets=[-8, 0]), PLACE),
    "offsets overlap": (shifted(-4), PLACE),
    "offsets with a gap": (shifted(4), PLACE),
    "100,000 lists": (payload(lambda packed: framed(b"[" * DEEP)), "not valid JSON|bytes came wh"),
    "lists as deep as fit": (
        payload(lambda packed: framed(b"[" * (len(packed) - 8), b"")),
        "not valid JSON|where at most",
    ),
    "scales 2,000 lists deep": (
        header(lambda entries, data: entries["__metadata__"].update(scales="[" * 2000)),
        "scales is not valid JSON",
    ),
    "a huge header within the budget": (
        payload(huge_header),
        "where at most .* can be needed|names no such",
    ),
    "a tensor named twice": (
        payload(
            lambda packed: doubled(next(iter(json.loads(packed[8 : header_end(packed)]))))(packed)
        ),
        "a name stands twice",
    ),
    "metadata named twice": (payload(doubled("__metadata__")), "a name stands twice"),
    "no metadata": (
        payload(lambda packed: framed(b"{}", packed[header_end(packed) :])),
        "expected an adapter in format bouquet-adapter-1",
    ),
    "another format": (
        header(lambda entries, data: entries["__metadata__"].update(format="pt")),
        "expected an adapter in format bouquet-adapter-1",
    ),
    "a dense module": (dense_first, "is a dense delta, where factors were expected"),
    # records
    "no adapter": (without("adapter"), NO_ADAPTER),
    "the adapter as a config": (record("adapter", ConfigRecord({"packed": b"abc"})), NO_ADAPTER),
    "the adapter as metrics": (record("adapter", MetricRecord({"packed": 1.0})), NO_ADAPTER),
    "no stamp": (without("reply"), "expected a ConfigRecord 'reply'; got nothing"),
    "the stamp as metrics": (
        record("reply", MetricRecord({"round": 1})),
        "expected a ConfigRecord 'reply'; got MetricRecord",
    ),
    "another round": (another_round, "expected a reply to round [0-9]+; got one to [0-9]+"),
    "rounds as a list": (stamp(round=[1, 2, 3]), "expected a reply to round [0-9]+; got one to"),
    "another base": (stamp(base="other"), "trained on base 'other'"),
    "no base": (stamp(base=b""), "trained on base 0 bytes"),
    "other data": (stamp(data="0ff"), "its data changed since the run began .hash '0ff'"),
    "data as a list": (stamp(data=["da"]), "its data changed since the run began"),
    "nothing at all": (lambda honest, message: RecordDict(), "expected a ConfigRecord 'reply'"),
    "the message itself": (
        lambda honest, message: message.content,
        "'instruction'.* not asked for",
    ),
    # failures
    "its own failure": (
        record("failure", ConfigRecord({"reason": "no data here"})),
        "the client reports: no data here",
    ),
    "a failure without a reason": (
        record("failure", ArrayRecord()),
        "the client reports: a failure without a reason",
    ),
    "a failure that takes the terminal": (
        record("failure", ConfigRecord({"reason": "\x1b[2J[/red]\r\n"})),
        r"the client reports: \\x1b\[2J\[/red\]\\r\\n$",
    ),
    "an error": (
        lambda honest, message: Error(2, "out of memory"),
        "the client failed: out of memory",
    ),
    "an endless error": (lambda honest, message: Error(2, "no! " * 10**5), "the client failed: no"),
    "an error without a reason": (lambda honest, message: Error(7), "the client failed: 7"),
}

OUT_OF_LINE: dict[str, tuple[Bad, str]] = {
    # well-formed, and refused only beside the others
    "norm thousands of times the median": (
        adapter(
            lambda x: Adapter(
                {n: Factors(f.a, f.b * np.float32(5000.0), f.scale) for n, f in x.items()}
            )
        ),
        "its change has norm .* times the median of the round",
    ),
}
