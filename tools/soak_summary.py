"""What the soak tells in the end."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Kill:
    """One kill -9 and what came of it."""

    kind: str
    run: str
    victim: str
    after_round: int
    """The newest committed round when it came."""
    take_up_seconds: float = 0.0
    """Until the next round was committed, or the result was there."""
    commands: int = 0
    """How often `flwr run` was given for it."""


def summary(kills: Sequence[Kill], runs: Sequence[tuple[str, int]], restarts: int) -> str:
    """A table of what was killed and how it went on.

    runs: name, and how many answers were missing in all its rounds.
    """
    lines = [
        "| killed | times | `flwr run` again | seconds to the next round | range |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for kind in dict.fromkeys(kill.kind for kill in kills):
        of_kind = [kill for kill in kills if kill.kind == kind]
        took = [kill.take_up_seconds for kill in of_kind]
        cells = [kind, len(of_kind), sum(kill.commands for kill in of_kind)]
        cells += [f"{statistics.median(took):.0f}", f"{min(took):.0f} to {max(took):.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    whole = sum(1 for _, missed in runs if not missed)
    lines.append(
        f"\n{len(runs)} runs ended with the bytes of their replay. In {whole} of them every client "
        f"counted in every round; in the others {sum(missed for _, missed in runs)} answers were "
        f"missing in all. SuperNodes were started again {restarts} times."
    )
    return "\n".join(lines)
