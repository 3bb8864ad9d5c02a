"""What the load test tells: a table over federations, and one of what may grow in each."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KINDS = ("SuperLink", "ServerApp", "SuperNodes")
SHOWN = 5
"""Rows of the table of what may grow, for each kind of process."""
WINDOW = 5
"""Rounds of which each of its rows is the median."""


@dataclass
class Outcome:
    """What came of one federation, whole or not."""

    sites: int
    rounds: int
    """That were asked for."""
    seconds: list[float] = field(default_factory=list)
    """Of each round that was committed."""
    counted: int = 0
    """Answers that counted, each with its own loss; `sites` of them belong to every round."""
    mixed: int = 0
    """Answers that counted with a loss of another client or round."""
    strays: int = 0
    """Answers that came late, twice, or to no question."""
    locked: int = 0
    """How often a log says that a request gave up on the database."""
    lost: int = 0
    """How often a SuperNode says that it failed to send or to receive a message."""
    bytes_same: bool | None = None
    """As those of the replay; None: not compared."""
    error: str = ""
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Every round closed, with every client, and ended as its replay did."""
        return not self.error and bool(self.bytes_same) and not self.mixed + self.missing

    @property
    def missing(self) -> int:
        """Answers that did not count in a round that was committed."""
        return self.sites * len(self.seconds) - self.counted - self.mixed


def table(outcomes: Sequence[Outcome]) -> str:
    """A row for each federation.

    >>> print(table([Outcome(2, 3, [4.0, 5.0], counted=4)]).splitlines()[-1])
    | 2 | 2 of 3 | 4.5 (4.0 to 5.0) | 0 | 0 | 0 | 0 | 0 | not compared |
    """
    lines = [
        "| sites | rounds | seconds a round, median (range) | answers missing | mixed up "
        "| late or double | lost on the way | database locked | bytes of the replay |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    said = {True: "the same", False: "OTHERS", None: "not compared"}
    for one in outcomes:
        seconds = "-"
        if one.seconds:
            middle = statistics.median(one.seconds)
            seconds = f"{middle:.1f} ({min(one.seconds):.1f} to {max(one.seconds):.1f})"
        rounds = f"{len(one.seconds)} of {one.rounds}"
        counts = one.missing, one.mixed, one.strays, one.lost, one.locked
        cells = [one.sites, rounds, seconds, *counts, said[one.bytes_same]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def growth(one: Outcome) -> str:
    """Medians over a few rounds, from the first to the last; of the SuperNodes, the largest."""
    whole = [sample for sample in one.samples if set(KINDS) <= sample.keys()]
    if len(whole) < 2:
        return f"{one.sites} sites: too few rounds to tell what grows"
    window = min(WINDOW, len(whole) // 2)
    last = len(whole) - window
    shown = min(SHOWN, last // window + 1)
    starts = sorted({k * last // (shown - 1) for k in range(shown)})
    spans = " | ".join(_span(whole, k, window) for k in starts)
    lines = [
        f"{one.sites} sites; the database had {whole[0]['database_mb']:.1f} MB after round "
        f"{whole[0]['round']}, {whole[-1]['database_mb']:.1f} MB after round {whole[-1]['round']}",
        "",
        f"| memory in MB; files; threads | {spans} |",
        "| --- " * (len(starts) + 1) + "|",
    ]
    for kind in KINDS:
        cells = [_middle([sample[kind] for sample in whole[k : k + window]]) for k in starts]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _span(samples: Sequence[Mapping[str, Any]], start: int, window: int) -> str:
    first, last = samples[start]["round"], samples[start + window - 1]["round"]
    return f"round {first}" if first == last else f"rounds {first} to {last}"


def _middle(samples: Sequence[Mapping[str, float]]) -> str:
    middles = (
        statistics.median(one[what] for one in samples) for what in ("mb", "files", "threads")
    )
    return "; ".join(f"{middle:.0f}" for middle in middles)
