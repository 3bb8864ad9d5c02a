"""Throw damaged payloads at the decoders of what clients send, and write down whatever breaks them.

    python -m tools.fuzz_codec                        # a million cases
    python -m tools.fuzz_codec --cases 1000 --seed 7
    python -m tools.fuzz_codec --seed 7 --only 123    # one case again, with its traceback

A case is an honest payload (an adapter in some number format, whole or one factor of it, or a head)
with one to four mutations (tools/payload_mutations.py). In most cases the SHA-256 is made true
again, so that the damage gets past it. A decoder must return what it promises, finite numbers of
the right shapes, or raise AdapterError; anything else is a crash, whose payload and traceback go to
the folder of `--crashes`. Exits with 1 where there was one.
"""

import argparse
import random
import re
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from adapters.adapter import Adapter, Factors
from core.errors import AdapterError
from tools.payload_mutations import HEAD_SHAPES, SHAPES, damaged, honest_head, honest_payload
from wire.codec import limits_of, unpack
from wire.head import unpack_head

KNOWN = Adapter(
    {
        name: Factors(np.ones((3, n), np.float32), np.ones((m, 3), np.float32), 1.0)
        for name, (m, n) in SHAPES.items()
    }
)


class BrokenDecoderError(Exception):
    """A decoder broke; the payload is the argument, the cause the bug."""


def decode(rng: random.Random, payload: bytes, is_head: bool) -> None:
    """Decode as the server does; raises AdapterError, or anything where a decoder is broken."""
    if is_head:
        head = unpack_head(payload, HEAD_SHAPES)
        assert {name: values.shape for name, values in head.items()} == HEAD_SHAPES
        arrays = list(head.values())
    else:
        factors = rng.choice(("both", "both", "both", "A", "B"))
        limits = limits_of(SHAPES, 3, factors) if rng.random() < 0.5 else None
        adapter = unpack(payload, KNOWN if rng.random() < 0.5 else None, limits)
        assert len(adapter) > 0
        assert all(np.isfinite(f.scale) for f in adapter.values())
        arrays = [half for f in adapter.values() for half in (f.a, f.b)]
    assert all(values.dtype == np.float32 for values in arrays)
    assert all(np.isfinite(values).all() for values in arrays)


def play(seed: int, case: int) -> tuple[bytes, str]:
    """One case: its payload, and how it ended: `admitted` or the reason of the refusal."""
    rng = random.Random(f"{seed} {case}")
    is_head = rng.random() < 0.1
    payload = damaged(rng, honest_head(rng) if is_head else honest_payload(rng))
    try:
        decode(rng, payload, is_head)
    except AdapterError as error:
        return payload, kind_of(str(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the safetensors library is no Exception
        raise BrokenDecoderError(payload) from error
    return payload, "admitted"


def kind_of(reason: str) -> str:
    """A reason without what is particular to the case."""
    words = re.sub(r"'.*?'|\"[^\"]*\"|\S*\d\S*|'.*|\[.*", " ", reason).split()
    return " ".join(words[:8])


def main() -> int:
    """Run the cases; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="play this one case")
    parser.add_argument("--crashes", type=Path, default=Path("fuzz-crashes"))
    arguments = parser.parse_args()
    if arguments.only is not None:
        print(play(arguments.seed, arguments.only)[1])
        return 0
    warnings.simplefilter("error")  # arithmetic that numpy warns of is a crash, too
    endings: Counter[str] = Counter()
    crashes = 0
    slowest = (0.0, 0)
    began = time.perf_counter()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, refresh_per_second=2) as progress:
        for case in progress.track(range(arguments.cases)):
            at = time.perf_counter()
            try:
                endings[play(arguments.seed, case)[1]] += 1
            except BrokenDecoderError as crash:
                crashes += 1
                arguments.crashes.mkdir(parents=True, exist_ok=True)
                name = arguments.crashes / f"seed-{arguments.seed}-case-{case}"
                name.with_suffix(".bin").write_bytes(crash.args[0])
                name.with_suffix(".txt").write_text(traceback.format_exc())
            slowest = max(slowest, (time.perf_counter() - at, case))
    seconds = time.perf_counter() - began
    for ending, count in endings.most_common(40):
        print(f"{count:10,}  {ending}")
    print(
        f"{arguments.cases:,} cases of seed {arguments.seed} in {seconds:.0f} s; "
        f"{endings['admitted']:,} admitted, {crashes:,} crashes"
        + (f" in {arguments.crashes}" if crashes else "")
        + f"; slowest {slowest[0] * 1000:.0f} ms (case {slowest[1]}), peak "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"
    )
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
