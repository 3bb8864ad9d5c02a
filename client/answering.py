"""A Flower ClientApp of three functions: who the client is, how it trains, how it evaluates.

What they raise as BouquetError becomes a Failure that names the reason, and a site that keeps what
it received says what it holds, in whatever it answers.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.job import Shelf
from client.pieces import held_pieces
from client.shelf import RecordShelf, run_shelf
from core.errors import BouquetError
from settings.site import parse_site
from wire.messages import EvaluateReply, Failure, Instruction, Query, TrainReply
from wire.site_card import SiteCard

Answer: TypeAlias = SiteCard | TrainReply | EvaluateReply | Failure


def client_app(
    query: Callable[[Query, Context], SiteCard],
    train: Callable[[Instruction, RecordDict, Context], TrainReply],
    evaluate: Callable[[Instruction, RecordDict, Context], EvaluateReply],
    mods: list[Any] | None = None,
) -> ClientApp:
    """The app. `train` and `evaluate` get the records of the message, which hold the model.

    mods: Flower's, around every message.
    """
    app = ClientApp(mods=mods)

    @app.query()
    def answer_query(message: Message, context: Context) -> Message:
        return _answer(
            lambda: query(Query.from_records(message.content), context), message, context
        )

    @app.train()
    def answer_train(message: Message, context: Context) -> Message:
        return _answer(
            lambda: train(Instruction.from_records(message.content), message.content, context),
            message,
            context,
        )

    @app.evaluate()
    def answer_evaluate(message: Message, context: Context) -> Message:
        return _answer(
            lambda: evaluate(Instruction.from_records(message.content), message.content, context),
            message,
            context,
        )

    return app


def name_of(context: Context) -> str:
    """What this site is called, even where its node config is what failed."""
    try:
        return parse_site(context.node_config).name
    except BouquetError:
        return str(context.node_config.get("name", f"node {context.node_id}"))


def shelf_of(context: Context, run: str) -> Shelf:
    """Where this site keeps what it needs again in this run."""
    cache = _cache(context)
    return RecordShelf(context.state) if cache is None else run_shelf(cache, run)


def _answer(made: Callable[[], Answer], message: Message, context: Context) -> Message:
    answer: Answer
    try:
        answer = made()
    except BouquetError as error:
        answer = Failure(str(error), name_of(context))
    if cache := _cache(context):
        answer = _holding(answer, frozenset(held_pieces(cache)))
    return Message(answer.to_records(), reply_to=message)


def _holding(answer: Answer, pieces: frozenset[str]) -> Answer:
    if isinstance(answer, TrainReply | EvaluateReply):
        return replace(answer, stamp=replace(answer.stamp, holds=pieces))
    return replace(answer, holds=pieces)


def _cache(context: Context) -> Path | None:
    path = context.node_config.get("cache-path")
    return Path(str(path)).expanduser() if path else None
