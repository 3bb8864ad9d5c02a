"""What a bad client answers to a query and to an evaluation: tables like malformed_replies.py.

A row is what spoils an honest answer, and a pattern that the reason of its refusal must match.
"""

from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from tests.server.spoiling import Bad, lacking_metric, metric, record, replaced, stamp, without
from wire.records import to_record

INF, NAN = float("inf"), float("nan")
HUGE = 10**5000
"""More digits than Python prints."""
MANY = ["a"] * 300_000
ENDLESS = "no! " * 5_000_000
ESCAPES = "\x1b[2J\u202e\n"


def site(**values: Any) -> Bad:
    """The honest answer, with other values in its `site`; an underscore stands for a hyphen."""
    told = {name.replace("_", "-"): value for name, value in values.items()}
    return lambda honest, message: replaced(
        honest,
        site=ConfigRecord({**honest["site"], **told}),  # type: ignore[dict-item]
    )


def lacking(name: str) -> Bad:
    def bad(honest: RecordDict, message: Message) -> RecordDict:
        told: Any = {n: v for n, v in honest["site"].items() if n != name}
        return replaced(honest, site=ConfigRecord(told))

    return bad


def failure(kind: Any, reason: Any) -> Bad:
    return record("failure", kind({"reason": reason}))


def unasked(*names: str) -> Bad:
    return lambda honest, message: RecordDict(
        {**honest, **{name: ConfigRecord({"x": 1}) for name in names}}
    )


def not_a_number(low: int, high: int) -> dict[str, Any]:
    """What is no whole number between the two, by a name for it."""
    return {
        "inf": INF,
        "-inf": -INF,
        "nan": NAN,
        "a fraction": low + 0.5,
        "true": True,
        "text": "3",
        "bytes": b"\x03",
        "a list": [3],
        "too low": low - 1,
        "too high": high + 1,
        "huge": HUGE,
    }


NO_LIST: dict[str, Any] = {"a number": 6, "text": "6,4,6", "bytes": b"\x06", "inf": INF}
BAD_SIDES: dict[str, Any] = NO_LIST | {
    "infinite": [INF, INF, INF],
    "nan": [NAN, NAN, NAN],
    "fractions": [6.5, 4.5, 6.5],
    "texts": ["6", "4", "6"],
    "bytes each": [b"6", b"4", b"6"],
    "true each": [True, True, True],
    "zero": [6, 0, 6],
    "negative": [6, -4, 6],
    "too long": [6, 10**7 + 1, 6],
    "huge": [6, HUGE, 6],
    "300,000": [6] * 300_000,
}
BAD_NAMES: dict[str, Any] = NO_LIST | {
    "numbers": [1, 2, 3],
    "bytes each": [b"q", b"v", b"k"],
    "escapes": [f"q{ESCAPES}", "v", "k"],
    "endless": ["q" * 10**6, "v", "k"],
    "300,000": MANY,
}
SITE_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "number": (not_a_number(0, 10**9), "number must be a whole number from 0"),
    "rank": (not_a_number(1, 10**7), "rank must be a whole number from 1"),
    "num-examples": (not_a_number(0, 10**9), "num-examples must be a whole number from 0"),
    "rows": (BAD_SIDES, "rows must be a list|each of rows must be|modules, and rows and columns"),
    "columns": (BAD_SIDES, "columns must be a list|each of columns must be|and rows and columns"),
    "modules": (BAD_NAMES, "modules must be|each of modules must be"),
    "head": (BAD_NAMES, "head must be|each of head must be|3 arrays of a head, and 0 shapes"),
    "head-shapes": (
        NO_LIST
        | {
            "numbers": [3],
            "infinite": [INF],
            "bytes each": [b"3x5"],
            "no sides": [""],
            "half": ["3x"],
            "zero": ["0x3"],
            "negative": ["3x-1"],
            "infinite sides": ["infxnan"],
            "long sides": ["9" * 39],
            "many sides": ["3x5x2x2x2"],
            "300,000": MANY,
        },
        "head-shapes must be a list|each of head-shapes must be",
    ),
    "base": (
        {"a number": 1, "bytes": b"fake-base", "a list": ["fake-base"], "escapes": f"fake{ESCAPES}"}
        | {"endless": ENDLESS, "inf": INF},
        "base must be a printable text",
    ),
    "client": (
        {"a number": 7, "bytes": b"oslo", "a list": ["oslo"], "empty": "", "escapes": ESCAPES}
        | {"a path": "../../etc/passwd", "a folder": "..", "a Windows path": r"a\b"}
        | {
            "another's by its node": "client-00@2",
            "right to left": "oslo\u202e",
            "endless": ENDLESS,
        },
        "client must be a printable text",
    ),
}
OPTIONAL_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "data": (
        {"a number": 7, "bytes": b"aa", "a list": ["aa"], "no hash": "none", "endless": ENDLESS},
        "data must be a printable text",
    ),
    "chat-template": (
        {"a number": 7, "inf": INF, "itself": "{{ x }}", "a list": ["aa"]},
        "chat-template must be a printable text",
    ),
    "labels": (
        {"a number": 7, "text": "a,b", "numbers": [1, 2], "300,000": MANY, "bytes each": [b"a"]},
        "its labels are no",
    ),
    "holds": (
        {"a number": 7, "text": "aa", "numbers": [1], "paths": ["../x"], "300,000": MANY},
        "holds must be a list|each of holds must be",
    ),
}
EVERY_MESSAGE: dict[str, tuple[Bad, str]] = {
    "a record that nobody asked for": (unasked("junk"), "the record 'junk' was not asked for"),
    "two records that nobody asked for": (unasked("x", "y"), "'x', 'y' were not asked for"),
    "a thousand records": (
        unasked(*(f"x{n:04d}" for n in range(1000))),
        r"'x0000', 'x0001'.* \(showing 5 of 1000\) were not asked for",
    ),
    "a record with escapes for a name": (
        unasked(ESCAPES),
        r"the record '\\x1b\[2J\\u202e\\n' was not asked for",
    ),
    "a record with an endless name": (unasked(ENDLESS), "' of 20,000,000 characters was not asked"),
    "nothing at all": (lambda honest, message: RecordDict(), "expected a .* got nothing"),
    "a failure": (failure(ConfigRecord, "no data"), "the client reports: no data"),
    "a failure and no more": (
        lambda honest, message: RecordDict({"failure": ConfigRecord({"reason": "no"})}),
        "the client reports: no",
    ),
    "a failure as arrays": (record("failure", ArrayRecord()), "a failure without a reason"),
    "a failure as metrics": (failure(MetricRecord, INF), "a failure without a reason"),
    "a failure for a number": (failure(ConfigRecord, HUGE), "a failure without a reason"),
    "a failure for bytes": (failure(ConfigRecord, b"no"), "a failure without a reason"),
    "a failure for 300,000 reasons": (failure(ConfigRecord, MANY), "a failure without a reason"),
    "a failure for 20 MB of reason": (failure(ConfigRecord, ENDLESS), "the client reports: no! no"),
    "a failure that takes the terminal": (
        failure(ConfigRecord, ESCAPES),
        r"the client reports: \\x1b\[2J\\u202e\\n",
    ),
    "an error": (lambda honest, message: Error(2, "out of memory"), "failed: out of memory"),
    "an endless error": (lambda honest, message: Error(2, ENDLESS), "the client failed: no! no"),
    "an error that takes the terminal": (
        lambda honest, message: Error(2, ESCAPES),
        r"the client failed: \\x1b\[2J\\u202e\\n",
    ),
    "an error without a reason": (lambda honest, message: Error(7), "the client failed: 7"),
    "an adapter that nobody asked for": (
        record("principal", to_record(b"abc")),
        "the record 'principal' was not asked for",
    ),
}
BAD_SITES = [(key, *SITE_VALUES[key]) for key in SITE_VALUES] + [
    (key, *OPTIONAL_VALUES[key]) for key in OPTIONAL_VALUES
]
MALFORMED_SITES: dict[str, tuple[Bad, str]] = {
    **{
        f"{key}: {what}": (site(**{key: value}), pattern)
        for key, values, pattern in BAD_SITES
        for what, value in values.items()
    },
    **{f"{key}: missing": (lacking(key), f"{key} is missing") for key in SITE_VALUES},
    **EVERY_MESSAGE,
    "no modules": (site(modules=[], rows=[], columns=[]), "it names no module"),
    "lists of different length": (
        site(modules=["q"], rows=[1, 2], columns=[]),
        "it names 1 modules, and rows and columns of 2, 0",
    ),
    "a module twice": (site(modules=["q", "q", "v"]), "each of modules must be there once"),
    "a head without shapes": (site(head=["w"]), "1 arrays of a head, and 0 shapes"),
    "a head twice": (
        site(head=["w", "w"], head_shapes=["3", "3"]),
        "each of head must be there once",
    ),
    "a head of all memory": (
        site(head=["w"], head_shapes=["9999999x9999999"]),
        "its head has more than 10,000,000,000 values",
    ),
    "rank beyond a module": (site(rank=5), "rank 5 does not fit modules of smallest side 4"),
    "50,000 keys": (
        site(**{f"x{n}": 1 for n in range(50_000)}),
        "the record 'site' may have 64 keys at most; it has 50,0",
    ),
    "a key of escapes": (site(**{ESCAPES: 1}), r"keys of 'site' .* got '\\x1b\[2J\\u202e\\n'"),
    "no site": (without("site"), "expected a ConfigRecord 'site'; got nothing"),
    "the site as metrics": (record("site", MetricRecord()), "'site'; got MetricRecord"),
    "the site as arrays": (record("site", ArrayRecord()), "'site'; got ArrayRecord"),
    "the message itself": (lambda honest, message: message.content, "'ask'.* were not asked for"),
    "a failure in another's name": (
        record("failure", ConfigRecord({"reason": "no data", "client": "client-00"})),
        "the client reports: no data",
    ),
    "another base": (site(base="other"), "has base model other, the run's is fake-base"),
    "other modules": (site(modules=["q", "v", "k"]), "adapts other modules than the run"),
    "another head": (site(head=["w"], head_shapes=["3x5"]), "another classification head"),
}
BAD_METRICS: dict[str, tuple[dict[str, Any], str]] = {
    "loss": (
        {"1e18": 1e18, "nan": NAN, "inf": INF, "-inf": -INF, "negative": -1.0, "a list": [1.0]}
        | {"1e300": 1e300, "huge": HUGE, "300,000": [1.0] * 300_000},
        "loss must be a finite number from 0 to 10000",
    ),
    "tokens": (
        {"1e18": 1e18, "10**18": 10**18, "nan": NAN, "inf": INF, "negative": -1, "a list": [10]}
        | {"a fraction": 1.5, "huge": HUGE},
        "tokens must be a whole number from 0 to 1,000,000,000,000",
    ),
    "num-examples": (
        {"negative": -1, "a fraction": 1.5, "nan": NAN, "1e18": 1e18, "a list": [4], "huge": HUGE},
        "num-examples must be a whole number from 0 to 1,000,000,000",
    ),
    "accuracy": (
        {"99": 99, "negative": -0.1, "nan": NAN, "a list": [0.5], "inf": INF},
        "accuracy must be a finite number from 0 to 1",
    ),
    "macro-f1": (
        {"more than all": 1.01, "-inf": -INF, "a list": [0.5]},
        "macro-f1 must be a finite number from 0 to 1",
    ),
}
NEEDS = "an evaluation needs a loss and tokens above zero"
MALFORMED_EVALUATIONS: dict[str, tuple[Bad, str]] = {
    **{
        f"{name}: {what}": (metric(name, value), pattern)
        for name, (values, pattern) in BAD_METRICS.items()
        for what, value in values.items()
    },
    **EVERY_MESSAGE,
    "tokens: none": (metric("tokens", 0), NEEDS),
    "tokens: missing": (lacking_metric("tokens"), NEEDS),
    "loss: missing": (lacking_metric("loss"), NEEDS),
    "empty metrics": (record("metrics", MetricRecord()), NEEDS),
    "50,000 metrics": (
        record("metrics", MetricRecord({f"x{n}": 1.0 for n in range(50_000)})),
        "the record 'metrics' may have 64 keys at most; it has 50,000",
    ),
    "a metric of escapes": (metric(ESCAPES, 1.0), r"keys of 'metrics' .* got '\\x1b\[2J"),
    "a metric of a path": (metric("../../x", 1.0), "keys of 'metrics' .* got '../../x'"),
    "an endless metric": (metric("x" * 10**6, 1.0), "' of 1,000,000 characters"),
    "no metrics": (without("metrics"), "a MetricRecord 'metrics'; got nothing"),
    "metrics as a config": (record("metrics", ConfigRecord({"loss": 1.0})), "got ConfigRecord"),
    "metrics as arrays": (record("metrics", ArrayRecord([np.ones(3)])), "got ArrayRecord"),
    "no stamp": (without("reply"), "expected a ConfigRecord 'reply'; got nothing"),
    "the stamp as metrics": (record("reply", MetricRecord({"round": 1})), "got MetricRecord"),
    "the stamp as arrays": (record("reply", ArrayRecord()), "got ArrayRecord"),
    "another round": (stamp(round=99), "expected a reply to round [0-9]; got one to 99"),
    "a round before all": (stamp(round=-1), "expected a reply to round [0-9]; got one to -1"),
    "an infinite round": (stamp(round=INF), "expected a reply to round [0-9]; got one to inf"),
    "a round of true": (stamp(round=True), "expected a reply to round [0-9]; got one to True"),
    "a huge round": (stamp(round=HUGE), "got one to a number of 16,610 bits"),
    "a list of rounds": (stamp(round=[0, 1, 2]), "got one to a list of 3"),
    "another base": (stamp(base="other"), "trained on base 'other'"),
    "an endless base": (stamp(base=ENDLESS), "of 20,000,000 characters; the run's is"),
    "a base of bytes": (stamp(base=b"fake-base"), "trained on base 9 bytes"),
    "other data": (stamp(data="0ff"), "its data changed since the run began"),
    "a list of data": (stamp(data=MANY), "data changed .*hash a list of 300,000"),
    "no data": (stamp(data=""), "its data changed since the run began"),
    "it holds a number": (stamp(holds=7), "holds must be a list"),
    "it holds a path": (stamp(holds=["../x"]), "each of holds must be"),
    "it holds 300,000": (stamp(holds=MANY), "holds must be a list of at most 10,000"),
    "an adapter": (record("adapter", to_record(b"abc")), "the record 'adapter' was not asked for"),
    "a head": (record("head", to_record(b"abc")), "the record 'head' was not asked for"),
    "a site": (record("site", ConfigRecord({"rank": 3})), "the record 'site' was not asked for"),
    "the message itself": (lambda honest, message: message.content, "'instruction'.*not asked for"),
}
