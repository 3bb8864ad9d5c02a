"""What an aggregation method is: a value for the global model, and rules for what happens to it.

    global model after a round:   W + delta(merged) + delta(start)

`merged` is frozen and cumulative: clients add it to their base. `start` is what they go on
training from; without one each client draws fresh factors (A random, B zero).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeAlias

from adapters.adapter import Adapter, Delta, FloatArray
from adapters.algebra import add, mean_of_factors
from adapters.head import Head
from adapters.terms import Term
from core.errors import AdapterError
from wire.rules import LocalRule

State: TypeAlias = Mapping[str, Adapter | FloatArray | str | int]


@dataclass(frozen=True, eq=False)
class GlobalModel:
    """What the server holds between two rounds, apart from bookkeeping."""

    merged: Delta | None = None
    start: Adapter | None = None
    head: Head | None = None
    """What trains beside the factors; averaged by the server, unless each client keeps its own."""
    state: State = field(default_factory=dict)
    """What the method itself must remember: whose turn it is, a momentum."""

    def total(self) -> Delta | None:
        """Merged + start in one; None while the global model is the base itself."""
        parts = [part for part in (self.merged, self.start) if part is not None]
        return add(parts, [1.0] * len(parts)) if parts else None


@dataclass(frozen=True, eq=False)
class Update:
    """One client's admitted reply."""

    client: str
    weight: float
    """p_k, in (0, 1]; the weights of a cohort sum to 1."""
    adapter: Adapter
    control: Adapter | None = None
    """By how much the client's control variate changed, where the rule asks for one: gradients of A
    and of B, scale 1."""


@dataclass(frozen=True, eq=False)
class Cohort:
    """What a round brought: the clients' updates, and what stayed frozen in their models."""

    updates: Sequence[Update]
    """At least one, in a fixed order."""
    frozen: Adapter | None = None
    """sum_k p_k delta of what client k kept frozen of the start, where the rule says so."""
    population: int = 0
    """Clients of the run, of whom the updates' are some; 0: there are no others."""

    @cached_property
    def total(self) -> Delta:
        """sum_k p_k s_k B_k A_k, with what stayed frozen: formed once, however many ask for it."""
        kept = [] if self.frozen is None else [self.frozen]
        adapters = [update.adapter for update in self.updates]
        weights = [update.weight for update in self.updates]
        return add([*adapters, *kept], [*weights, *(1.0 for _ in kept)])


@dataclass(frozen=True, eq=False)
class Aggregated:
    """What a method makes of a cohort."""

    model: GlobalModel
    gained: tuple[Term, ...] | None = None
    """What merged gained in the round, in terms that a site lacks or has (a start that it was
    sent); None: the method does not tell, and all of merged travels anew."""


@dataclass(frozen=True)
class Properties:
    """What a method promises; the contract tests hold it to this.

    In the formulas of bytes, for one client in one round, b is the bytes of a value; M, N, D the
    sums over modules of m, n, m + n; r the common rank, r_k the client's, R the largest, S the sum
    of the ranks in the cohort. They hold for a client that keeps what it was sent.
    """

    title: str
    source: str
    mixed_ranks: bool
    """Clients may train different ranks."""
    exact: bool
    """The new global model is exactly the one before plus sum_k p_k s_k B_k A_k."""
    reveals: str
    """What one client can learn of another client's adapter from what the server sends."""
    sums_only: bool
    """The server needs only weighted sums of what clients send, as secure aggregation gives it."""
    bytes_up: str
    bytes_down: str
    forgets_unseen: bool = False
    """At mixed ranks, a round in which only clients of low rank take part erases the directions
    that they do not have."""
    weighs_anew: str = ""
    """How the method undoes the weights p_k of single clients; empty: it does not. Where it does,
    robust weights would protect nothing, and are refused."""
    personal: bool = False
    """Each client has a model of its own, and there is no global one."""
    averages: bool = False
    """The start is a weighted mean of factors: a direction that a server may step along."""
    steps: bool = False
    """The server takes a step of its own and does not go where the clients' mean is."""
    keeps_untouched: bool = False
    """Directions that nobody of the cohort has stay as they were."""
    begins_from_base: bool = False
    """`begin` needs the leading singular directions of the base weights instead of random ones.
    They are the start, and merged is less the start, so that the global model is the base."""


class Strategy(Protocol):
    """An aggregation method. Immutable; all that changes is in the GlobalModel."""

    @property
    def properties(self) -> Properties:
        """What this method promises."""
        ...

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The global model before round one; its delta is zero.

        fresh: factors drawn from the run's seed at the largest rank of any client (A random, B
        zero), for methods whose clients must begin alike; under `begins_from_base` the best
        approximation of the base weights at that rank.
        """
        ...

    def local_rule(self, model: GlobalModel, client: str) -> LocalRule:
        """What this client is asked to do with this model."""
        return LocalRule()

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """The next global model from this one and what a round brought.

        The caller passes updates in a fixed order, with weights that sum to 1, and takes care of
        the head.
        """
        ...


def whole_number(state: State, name: str, default: int) -> int:
    """The whole number of this name in a method's state."""
    value = state.get(name, default)
    assert isinstance(value, int)
    return value


def check_one_rank(updates: Sequence[Update]) -> None:
    """AdapterError where the factors of a module come with more than one rank."""
    for name in updates[0].adapter:
        ranks = {update.adapter[name].rank for update in updates}
        if len(ranks) > 1:
            raise AdapterError(
                f"factors average only at one rank; {name} comes with ranks {sorted(ranks)}"
            )


def mean(updates: Sequence[Update]) -> Adapter:
    """The weighted mean of each factor on its own, at the one rank that all updates have."""
    return mean_of_factors([u.adapter for u in updates], [u.weight for u in updates])
