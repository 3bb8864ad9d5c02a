"""What a report says in words: who is best, by how much, and how surely."""

import math
import statistics
from collections.abc import Mapping, Sequence

from core.errors import listing
from core.units import counted, human_bytes
from journal.record import ACCURACY, LOSS, MACRO_F1, METRICS, OWN_ACCURACY, OWN_LOSS
from journal.results import Run, Spread, SummaryRow, headline_metric
from reports.figure_data import Series, number

EVALUATED = (ACCURACY, MACRO_F1, LOSS)
WORDS = {
    LOSS: METRICS[LOSS].words,
    ACCURACY: METRICS[ACCURACY].words,
    OWN_LOSS: "mean loss, by tokens, on the clients' own held-out examples",
    OWN_ACCURACY: "mean accuracy, each client counting once, on the clients' own held-out examples",
}
HEADLINES = {key: (words, METRICS[key].best, METRICS[key].better) for key, words in WORDS.items()}
"""Metric -> its words in a sentence, what its best value is called, and 1 where less is better."""
VISIBLE = 5e-5
"""Gaps below this are 0 in the digits that are shown."""
LONGEST_REASON = 220


def verdict(rows: Sequence[SummaryRow], lineup: Sequence[Series]) -> list[str]:
    """The sentences at the top."""
    titles = {series.name: series.title for series in lineup}
    headline = headline_of(rows)
    ranked = federated(rows, lineup, headline)
    base = base_metrics([run for series in lineup for run in series.runs]).get(headline)
    found: list[str] = []
    if len(ranked) > 1:
        found += _comparison(ranked, headline, titles, base)
    elif ranked:
        found += _alone(ranked[0], headline, titles, base)
    found += _against_references(rows, lineup, headline, ranked)
    if headline in EVALUATED:
        found += _without_global_model(rows, lineup)
    judged = found or ["There is nothing to judge: no run has come to an evaluated round."]
    return judged + _failures(rows, titles)


def base_metrics(runs: Sequence[Run]) -> dict[str, Spread]:
    """What the base model reaches before any training, over seeds."""
    first = {run.seed: run.rounds[0] for run in runs if run.rounds and run.rounds[0]["round"] == 0}
    found: dict[str, list[float]] = {}
    for record in first.values():
        for key in (*EVALUATED, OWN_LOSS):
            value = number(record.get(key))
            if value is not None:
                found.setdefault(key, []).append(value)
        for metric, worst in (("loss", max), ("accuracy", min)):
            values = [number(c.get(metric)) for c in record.get("client_held_out") or []]
            own = [value for value in values if value is not None]
            if own:
                found.setdefault(f"client_{metric}_mean", []).append(statistics.fmean(own))
                found.setdefault(f"worst_client_{metric}", []).append(worst(own))
                found.setdefault(f"client_{metric}_deviation", []).append(statistics.pstdev(own))
    return {key: Spread(tuple(values)) for key, values in found.items()}


def headline_of(rows: Sequence[SummaryRow]) -> str:
    """What rows are ranked by; where no global model was evaluated, the clients' own metrics."""
    named = {name for row in rows for name in row.metrics}
    choices = (headline_metric(rows), OWN_ACCURACY, OWN_LOSS)
    return next((name for name in choices if name in named), LOSS)


def federated(
    rows: Sequence[SummaryRow], lineup: Sequence[Series], headline: str
) -> list[SummaryRow]:
    """Strategies with a global model, the best first."""
    references = {series.name for series in lineup if series.reference}
    return [row for row in rows if headline in row.metrics and row.name not in references]


def told_apart(one: SummaryRow, other: SummaryRow, headline: str) -> bool:
    """Whether two strategies differ by at least the larger deviation over seeds.

    With one seed there is no deviation to go by, so only gaps too small to show are none.
    """
    first, second = one.metrics[headline], other.metrics[headline]
    gap = abs(first.mean - second.mean)
    return one is not other and gap >= max(first.deviation, second.deviation) and gap >= VISIBLE


def _comparison(
    ranked: Sequence[SummaryRow],
    headline: str,
    titles: Mapping[str, str],
    base: Spread | None,
) -> list[str]:
    words, extreme, _ = HEADLINES[headline]
    best, second = ranked[0], ranked[1]
    spread = best.metrics[headline]
    few = min(len(spread.values), len(second.metrics[headline].values)) < 2
    start = f"{titles[best.name]} ends with the {extreme} {words}, {_with_spread(spread)}"
    found = [start + _from_base(spread, base) + "."]
    gap = abs(second.metrics[headline].mean - spread.mean)
    if few:
        shown = f"{gap:.4f}" if gap >= VISIBLE else "less than 0.0001"
        found.append(
            f"The next, {titles[second.name]}, is {shown} behind; one seed says little about a "
            "gap: repeat with several before you believe an order."
        )
        return found
    tied = [row for row in ranked[1:] if not told_apart(best, row, headline)]
    if tied:
        others = listing([titles[row.name] for row in tied], limit=6)
        found.append(
            f"It cannot be told apart from {others}: the gap is smaller than the spread over seeds."
        )
    nearest = next((row for row in ranked[1:] if row not in tied), None)
    if nearest is not None:
        deviation = max(spread.deviation, nearest.metrics[headline].deviation)
        behind = abs(nearest.metrics[headline].mean - spread.mean)
        times = (
            f", {behind / deviation:.1f} times the larger standard deviation over seeds"
            if deviation > 0.0
            else ""
        )
        found.append(
            f"The {'first that can' if tied else 'next'}, {titles[nearest.name]}, is {behind:.4f} "
            f"behind{times}."
        )
    return found


def _with_spread(spread: Spread) -> str:
    if len(spread.values) < 2:
        return f"{spread.mean:.4f}"
    count = len(spread.values)
    return f"{spread.mean:.4f} ± {spread.deviation:.4f} (standard deviation over {count} seeds)"


def _from_base(spread: Spread, base: Spread | None) -> str:
    return f", from {base.mean:.4f} of the base model" if base is not None else ""


def _alone(
    row: SummaryRow, headline: str, titles: Mapping[str, str], base: Spread | None
) -> list[str]:
    words = HEADLINES[headline][0]
    spread, rounds = row.metrics[headline], row.metrics["rounds"].most
    found = f"After {counted(int(rounds), 'round')} {titles[row.name]} has a {words} of "
    found += _with_spread(spread)
    found += _from_base(spread, base)
    if headline == LOSS and base is not None:
        before, after = (math.exp(min(value, 700.0)) for value in (base.mean, spread.mean))
        found += f" (perplexity {before:,.1f} to {after:,.1f})"
    sent = [human_bytes(row.metrics[key].mean) for key in ("bytes_up", "bytes_down")]
    found += f"; {sent[0]} went up and {sent[1]} down."
    return [found, *(["One seed says little about a method."] if len(spread.values) < 2 else [])]


def _against_references(
    rows: Sequence[SummaryRow],
    lineup: Sequence[Series],
    headline: str,
    ranked: Sequence[SummaryRow],
) -> list[str]:
    _, _, sign = HEADLINES[headline]
    series = {each.name: each for each in lineup}
    found = []
    for row in rows:
        if not series[row.name].reference or not ranked:
            continue
        if headline in row.metrics:
            gap = sign * (ranked[0].metrics[headline].mean - row.metrics[headline].mean)
            side = "better" if gap > 0 else "worse"
            value = row.metrics[headline].mean
            found.append(
                f"{series[row.name].title}, for reference, reaches {value:.4f}, {abs(gap):.4f} "
                f"{side} than {series[ranked[0].name].title}."
            )
    return found


def _without_global_model(rows: Sequence[SummaryRow], lineup: Sequence[Series]) -> list[str]:
    personal = {series.name: series.title for series in lineup if series.personal}
    found = []
    for row in rows:
        metric = OWN_ACCURACY if OWN_ACCURACY in row.metrics else OWN_LOSS
        mean = row.metrics.get(metric)
        if row.name in personal and mean is not None:
            found.append(
                f"{personal[row.name]} has a model for each client and no global one; its "
                f"{HEADLINES[metric][0]} is {mean.mean:.4f}."
            )
    return found


def _failures(rows: Sequence[SummaryRow], titles: Mapping[str, str]) -> list[str]:
    found = []
    for row in rows:
        for reason in dict.fromkeys(row.failures.values()):
            seeds = [seed for seed, other in row.failures.items() if other == reason]
            where = (
                f" (seed {listing(seeds)})" if row.seeds or len(seeds) < len(row.failures) else ""
            )
            text = " ".join(reason.split())
            if len(text) > LONGEST_REASON:
                text = text[:LONGEST_REASON].rstrip() + "…"
            found.append(f"{titles[row.name]}{where} has no result: {text.rstrip('.')}.")
    return found
