"""A step of the server's own: methods that take the mean of the factors as a direction to go.

    d = mean - start, of A and of s B each on its own
    start <- start + step(d)

Under the step lies any method whose start is a mean of factors (Properties.averages). A factor that
did not train in a round rests, whatever momentum it has.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from adapters.adapter import Adapter, Factors, FloatArray
from adapters.algebra import pad, rescale
from core.errors import UsageError
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy
from wire.rules import BOTH, A, B

Held: TypeAlias = Mapping[str, FloatArray]
Rule: TypeAlias = Callable[[FloatArray, dict[str, FloatArray]], FloatArray]
"""(d, what is held of this factor) -> the step; what it holds it writes back."""


def method_under(name: str, over: str) -> Strategy:
    """The method that averages; UsageError where it does not.

    name: of the method that steps.  over: of the one under it.
    """
    from strategies.registry import make_strategy, promises, strategy_names

    known = strategy_names()
    found = promises(over) if over != name else None
    if found is None or not found.averages:
        fit = [each for each in known if (about := promises(each)) and about.averages]
        raise UsageError(
            f"strategy.{name}.over must be a method that averages factors, one of "
            f"{', '.join(fit)}; got {over!r}"
        )
    return make_strategy(over)


def properties_over(method: Strategy, title: str, source: str) -> Properties:
    """What a server's step over this method promises."""
    under = method.properties
    plain = under.title.startswith("FedAvg")
    return Properties(
        title=title if plain else f"{title} over {under.title}",
        source=source,
        mixed_ranks=under.mixed_ranks,
        exact=False,
        reveals=under.reveals,
        sums_only=under.sums_only,
        bytes_up=under.bytes_up,
        bytes_down=under.bytes_down,
        forgets_unseen=under.forgets_unseen,
        weighs_anew=under.weighs_anew,
        personal=under.personal,
        steps=True,
    )


def stepped(
    method: Strategy, model: GlobalModel, cohort: Cohort, rule: Rule, held: Mapping[str, float]
) -> Aggregated:
    """The next model: the method's, with a start that went from the old one by the rule's step.

    held: name -> what every value of it is before round one, of each array that the rule holds.
    """
    assert model.start is not None
    made = method.aggregate(model, cohort).model
    assert made.start is not None
    trains = method.local_rule(model, cohort.updates[0].client).trains
    goal = rescale(made.start, 1.0)
    began = pad(rescale(model.start, 1.0), goal.rank)
    before = {name: _held(model, name, began, value) for name, value in held.items()}
    after: dict[str, dict[str, Factors]] = {name: {} for name in held}
    start = {}
    for module, f in began.items():
        parts: dict[str, FloatArray] = {}
        for factor, old, new in ((A, f.a, goal[module].a), (B, f.b, goal[module].b)):
            mine = {name: _factor(before[name][module], factor) for name in held}
            if trains in (factor, BOTH):
                parts[factor] = old + rule(new - old, mine)
            else:
                parts[factor] = old
            for name in held:
                parts[factor + name] = mine[name]
        start[module] = Factors(parts[A], parts[B], 1.0)
        for name in held:
            after[name][module] = Factors(parts[A + name], parts[B + name], 1.0)
    state = {**made.state, **{name: Adapter(modules) for name, modules in after.items()}}
    return Aggregated(GlobalModel(made.merged, Adapter(start), state=state))


def _held(model: GlobalModel, name: str, like: Adapter, value: float) -> Adapter:
    """What is held under this name, at the rank of `like`; where it is new, all of this value."""
    fresh = {
        module: Factors(np.full_like(f.a, value), np.full_like(f.b, value), 1.0)
        for module, f in like.items()
    }
    found = model.state.get(name)
    if isinstance(found, Adapter):
        for module, f in found.items():
            fresh[module].a[: f.rank] = f.a
            fresh[module].b[:, : f.rank] = f.b
    return Adapter(fresh)


def _factor(factors: Factors, factor: str) -> FloatArray:
    return factors.a if factor == A else factors.b
