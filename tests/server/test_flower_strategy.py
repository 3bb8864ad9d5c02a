"""Bouquet's strategies in Flower's own loop, with strangers among the clients."""

from typing import Any

from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import Result

from server.flower_strategy import FlowerStrategy
from settings.keys import flatten
from simulations.grid import InProcessGrid
from tests.fake_clients import fake_app, settings_of
from tests.server.malformed_answers import MALFORMED_EVALUATIONS
from tests.server.malformed_replies import MALFORMED_REPLIES
from tests.server.spoiling import Bad

HONEST, ROUNDS = 2, 2
SPOILED: list[tuple[str, Bad]] = [
    *(("train", bad) for bad, _ in MALFORMED_REPLIES.values()),
    *(("evaluate", bad) for bad, _ in MALFORMED_EVALUATIONS.values()),
]


def play(crash: bool) -> Result:
    """A run in which each stranger's answers of one kind are spoiled, or it crashes instead."""

    def tamper(client: int, message: Message, reply: Message) -> Message | None:
        if client < HONEST:
            return reply
        kind, make = SPOILED[client - HONEST]
        if message.metadata.message_type != kind:
            return None if message.metadata.message_type != "query" else reply
        bad: Any = None if crash else make(reply.content, message)
        return None if crash else Message(bad, reply_to=message)

    count = HONEST + len(SPOILED)
    settings = settings_of(
        "unused", clients__count=count, lora__rank="2", rounds=ROUNDS, evaluate__clients=True
    )
    grid = InProcessGrid(fake_app(tamper=tamper), count, flatten(settings))
    strategy = FlowerStrategy(settings)
    return strategy.start(grid, initial_arrays=ArrayRecord(), num_rounds=ROUNDS)


def test_malformed_answers_change_nothing_in_flowers_loop() -> None:
    wanted, found = play(crash=True), play(crash=False)
    assert [a.data for a in found.arrays.values()] == [a.data for a in wanted.arrays.values()]
    assert found.evaluate_metrics_clientapp == wanted.evaluate_metrics_clientapp
    losses = [dict(m) for m in found.evaluate_metrics_clientapp.values()]
    assert losses == [{"client-held-out-loss": 1.5}] * ROUNDS  # of 1.0 and 2.0, the honest clients'
