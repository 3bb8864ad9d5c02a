"""The strategy that a run's configuration names."""

from settings.run import RunSettings
from strategies.registry import Options, make_strategy
from strategies.strategy import Strategy


def method_of(settings: RunSettings) -> Strategy:
    """The strategy with its options; UsageError where they do not fit each other."""
    strategy = settings.strategy
    options = Options(
        energy=strategy.energy,
        policy=settings.start.policy,
        ridge=strategy.ridge,
        prune=strategy.prune,
        penalty=strategy.penalty,
    )
    return make_strategy(strategy.name, options)
