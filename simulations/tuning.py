"""The learning rate of each method: the best of a few, on a seed that is not reported.

At one rate methods take steps of different size, so a comparison at one rate compares rates. Each
method, references too, runs once for each rate offered, under a seed of its own; the one that ends
at the lowest held-out loss is what all its reported runs use.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import UsageError
from journal.record import LOSS, RoundRecord, value_of
from journal.results import LOCAL

APART = 1_000_000
"""The tuning seed is so far from the first seed that no reported run has it."""
LARGEST_SEED = 2**31
OWN_LOSS = "client_held_out_loss"


@dataclass(frozen=True)
class Trial:
    """One rate, tried."""

    rate: float
    loss: float | None
    """The final held-out loss; None where the run failed or diverged."""
    failure: str | None = None


@dataclass(frozen=True)
class Tuning:
    """What a method's trials came to."""

    seed: int
    metric: str
    """The loss by which it was chosen: of the global model, or of the clients' own."""
    trials: tuple[Trial, ...]
    """By rate, the lowest first."""

    @property
    def chosen(self) -> float | None:
        """The rate of the lowest loss, of two the lower rate; None where every rate failed.

        >>> Tuning(7, LOSS, (Trial(1e-3, 2.0), Trial(3e-3, 1.5), Trial(1e-2, None))).chosen
        0.003
        """
        ended = [trial for trial in self.trials if trial.loss is not None]
        return min(ended, key=lambda t: (t.loss, t.rate)).rate if ended else None

    @property
    def at_end(self) -> bool:
        """Whether the chosen rate is the lowest or highest offered: a better may lie beyond.

        >>> Tuning(7, LOSS, (Trial(1e-3, 2.0), Trial(3e-3, 1.5), Trial(1e-2, None))).at_end
        False
        """
        return self.chosen in (self.trials[0].rate, self.trials[-1].rate)

    def as_dict(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "seed": self.seed,
            "metric": self.metric,
            "chosen": self.chosen,
            "at_end_of_list": self.at_end,
            "trials": [
                {"rate": trial.rate, "loss": trial.loss, "failure": trial.failure}
                for trial in self.trials
            ],
        }


def parse_rates(listed: str) -> list[float]:
    """The rates of --tune-rates, the lowest first.

    >>> parse_rates("3e-3,3e-4,1e-3")
    [0.0003, 0.001, 0.003]
    """
    try:
        rates = sorted({float(part) for part in listed.split(",")})
    except ValueError:
        rates = []
    if len(rates) < 2 or not all(0.0 < rate < math.inf for rate in rates):
        raise UsageError(
            "--tune-rates expects two learning rates or more, above zero and with commas, such as "
            f"3e-4,1e-3,3e-3; got {listed!r}"
        )
    return rates


def tuning_seed(first: int) -> int:
    """The seed of the trials, from the first seed that is reported.

    >>> tuning_seed(0), tuning_seed(2**31)
    (1000000, 2146483648)
    """
    return first + APART if first + APART <= LARGEST_SEED else first - APART


def final_loss(name: str, rounds: Sequence[RoundRecord]) -> tuple[str, float | None]:
    """The loss by which a run is judged, and its last value; None where that is no finite number.

    The clients' own held-out loss where each client has a model of its own (personal methods,
    `local`) or where the server does not evaluate; else the global model's.
    """
    found: dict[str, float] = {}
    for record in rounds:
        if record["round"] > 0:
            values = {key: value_of(record, key) for key in (LOSS, OWN_LOSS)}
            found |= {key: value for key, value in values.items() if value is not None}
    metric = OWN_LOSS if OWN_LOSS in found and (name == LOCAL or LOSS not in found) else LOSS
    loss = found.get(metric, math.nan)
    return metric, loss if math.isfinite(loss) else None
