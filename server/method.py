"""The strategy that a run's configuration names."""

from core.errors import UsageError
from server.roster import Rules
from settings.keys import unknown_key
from settings.knobs import OWN, knobs_of
from settings.run import AUTO, RunSettings
from strategies.registry import (
    STRATEGIES,
    knobs_in,
    make_strategy,
    refuse_idle_knobs,
    refuse_weights,
    why_one_rank,
)
from strategies.strategy import Strategy


def method_of(settings: RunSettings) -> Strategy:
    """The strategy with its knobs; UsageError where they do not fit each other or the weights."""
    name, policy = settings.strategy.name, settings.start.policy
    known = [knob for knob, _, _ in knobs_in(name)]
    refuse_idle_knobs(settings.strategy.knobs)
    knobs = knobs_of(settings.strategy.knobs, name)
    if policy != AUTO:
        if "policy" not in known:
            having = [n for n in STRATEGIES if any(k == "policy" for k, _, _ in knobs_in(n))]
            raise UsageError(
                f"start.policy={policy} is for {', '.join(having)}; {name} "
                "says itself what a round begins from: leave start.policy at auto"
            )
        knobs["policy"] = policy
    if unknown := [knob for knob in knobs if knob not in known]:
        keys = [*OWN, *(f"strategy.{knob}" for knob in known)]
        raise UsageError(
            unknown_key(f"strategy.{unknown[0]}", keys)
            + (f" {name} has {', '.join(known)}." if known else f" {name} has no knobs.")
        )
    method = make_strategy(name, **{knob.replace("-", "_"): knobs[knob] for knob in knobs})
    refuse_weights(name, method, settings.clients.weights)
    _check_head(settings)
    return method


def rules_of(settings: RunSettings, strategy: Strategy) -> Rules:
    """Who may take part in a run with these settings."""
    clients = settings.clients
    one_rank = why_one_rank(settings.strategy.name, strategy)
    return Rules(clients.min_examples, clients.max_rank, one_rank)


def has_own_models(settings: RunSettings, strategy: Strategy) -> bool:
    """Whether each client has a model of its own, or its own head on the global one.

    Then the server can evaluate the base alone, and the clients evaluate in any case.
    """
    return strategy.properties.personal or settings.clients.head == "own"


def _check_head(settings: RunSettings) -> None:
    if settings.clients.head != "own":
        return
    if settings.task != "classification":
        raise UsageError(
            f"clients.head=own is for task=classification; task={settings.task} trains no head: "
            "leave clients.head at auto"
        )
    if settings.evaluate.trained:
        raise UsageError(
            "evaluate.trained needs the clients' heads, and under clients.head=own they never "
            "travel: set one of the two otherwise"
        )


def judged_by_clients(settings: RunSettings) -> bool:
    """Whether the losses of a run are the clients' own, because there is no global one to evaluate.

    So it is where each client has a model of its own, or its own head on the global one, and where
    the clients evaluate and the server does not.
    """
    if make_strategy(settings.strategy.name).properties.personal:
        return True
    own_heads = settings.task == "classification" and settings.clients.head == "own"
    return own_heads or (settings.evaluate.clients and not settings.evaluate.server)
