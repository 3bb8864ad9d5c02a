"""The Flower ClientApp: query, train and evaluate, for any strategy.

The client knows nothing of strategies: it receives the global model, an instruction and a seed, and
answers with an adapter. The same object runs in process, under Flower's simulation and at a site.

    query     -> site: name, rank, base identity, module shapes, labels, number of examples, hash of
                 data
    train     <- merged, start, head, instruction      -> adapter, head, metrics
    evaluate  <- merged, start, head, instruction      -> metrics
"""

from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from adapters.adapter import Adapter
from adapters.algebra import relative_error
from adapters.pruning import kept_rank, pruned
from client.instruction import Instruction, read_instruction
from client.pieces import held_pieces
from client.received import check_base, head_of, model_of
from client.shelf import RecordShelf, run_shelf
from core.errors import BouquetError
from core.events import log, log_to_stdout, logfmt
from settings.site import parse_site
from wire.codec import pack, unpack
from wire.head import pack_head
from wire.records import to_record

if TYPE_CHECKING:
    from client.site import Workplace

app = ClientApp()


def _answer(handler: Callable[[RecordDict, Context], RecordDict]) -> Callable[..., Message]:
    """A BouquetError becomes a reply that names the reason, so that the server can log it."""

    def answer(message: Message, context: Context) -> Message:
        try:
            content = handler(message.content, context)
        except BouquetError as error:
            failure = ConfigRecord({"reason": str(error), "client": _name(context)})
            content = RecordDict({"failure": failure})
        _tell_holdings(content, context)
        return Message(content, reply_to=message)

    return answer


def _name(context: Context) -> str:
    """What this site is called, even where its node config is what failed."""
    try:
        return parse_site(context.node_config).name
    except BouquetError:
        return str(context.node_config.get("name", f"node {context.node_id}"))


def _tell(event: str, told: Instruction, context: Context, **numbers: object) -> None:
    """A line in the site's log; simulated clients, which have no name, say nothing."""
    if "name" in context.node_config:
        log_to_stdout()
        who = {"node": context.node_id, "client": _name(context)}
        log.info(logfmt(event, round=told.round, version=told.version, **who, **numbers))


def _tell_holdings(content: RecordDict, context: Context) -> None:
    """A site that keeps what it received says what it has, in whatever it answers."""
    if cache := _cache(context):
        for name in {"site", "reply", "failure"} & set(content.config_records):
            content.config_records[name]["holds"] = held_pieces(cache)


def _cache(context: Context) -> Path | None:
    path = context.node_config.get("cache-path")
    return Path(str(path)).expanduser() if path else None


def _shelf(context: Context, told: Instruction) -> MutableMapping[str, bytes]:
    """Where this site keeps what it needs again in this run."""
    cache = _cache(context)
    return RecordShelf(context.state) if cache is None else run_shelf(cache, told.run)


def _stamp(told: Instruction, place: "Workplace") -> ConfigRecord:
    """What a reply belongs to: a round, a base, and the data that it was made of."""
    data = place.part.fingerprint
    return ConfigRecord({"round": told.round, "base": told.base, "data": data})


@app.query()
@_answer
def query(content: RecordDict, context: Context) -> RecordDict:
    """Who this site is, and the shapes of what it would train.

    Asked for it, also the leading singular directions of the base weights.
    """
    from client.site import open_workplace

    place = open_workplace(context)
    shapes, head = place.tuned.shapes, place.tuned.head_shapes
    answer = RecordDict(
        {
            "site": ConfigRecord(
                {
                    "client": place.site.name,
                    "number": place.site.number,
                    "rank": place.rank,
                    "base": place.tuned.base.identity,
                    "num-examples": len(place.training_examples()),
                    "data": place.part.fingerprint,
                    "chat-template": place.part.template,
                    "modules": list(shapes),
                    "rows": [m for m, _ in shapes.values()],
                    "columns": [n for _, n in shapes.values()],
                    "head": list(head),
                    "head-shapes": ["x".join(map(str, shape)) for shape in head.values()],
                    "labels": list(place.tuned.labels),
                }
            )
        }
    )
    ask = content.get("ask")
    if isinstance(ask, ConfigRecord) and "principal-rank" in ask:
        from models.principal import principal_factors

        rank = ask["principal-rank"]
        assert isinstance(rank, int)
        answer["principal"] = to_record(pack(principal_factors(place.tuned, rank)))
    return answer


@app.train()
@_answer
def train(content: RecordDict, context: Context) -> RecordDict:
    """Train for one round and return the factors."""
    from client.kept import as_own_head, recall, remember
    from client.pruning import RestPenalty
    from client.site import open_workplace
    from client.starting import starting_factors, with_frozen_tail, with_own_b
    from client.training import train as train_locally

    told = read_instruction(content)
    place = open_workplace(context, told.lora)
    check_base(told.base, place.tuned.base.identity)
    examples = place.training_examples()
    shapes, rank = place.tuned.shapes, told.rank_of(place.rank)
    shelf = _shelf(context, told)
    merged, start = model_of(content, shapes, rank, told, shelf)
    if start is not None and told.freezes_tail:
        merged = with_frozen_tail(merged, start, rank)
    begin = starting_factors(start, shapes, rank, told.lora.scale_of(rank), told.seed)
    kept = recall(shelf, told.round - 1)
    if told.keeps_b:
        begin = with_own_b(begin, kept)
    place.tuned.merge(merged)
    least = kept_rank(rank, told.prune, told.min_rank)
    trained = train_locally(
        place.tuned,
        examples,
        begin,
        told.local,
        told.seed,
        told.trains,
        told.lora.dropout,
        head=head_of(content, place.tuned, told, kept),
        penalty=RestPenalty(told.penalty, least) if least < rank else None,
        moments=kept if told.optimizer == "kept" else None,
    )
    adapter = pruned(begin, trained.adapter, least)
    keep = dict(trained.moments)
    if told.keeps_b:
        keep |= {name: factors.b for name, factors in adapter.items()}
    if told.keeps_head:
        keep |= as_own_head(trained.head)
    if keep:
        remember(shelf, told.round, keep)
    packed = pack(adapter, told.wire_dtype, told.sends)
    exact = told.wire_dtype == "float32"
    wire_error = 0.0 if exact else relative_error([adapter], [unpack(packed, adapter)])
    reply = RecordDict(
        {
            "adapter": to_record(packed),
            "reply": _stamp(told, place),
            "metrics": MetricRecord(
                {
                    "num-examples": len(examples),
                    "loss": trained.loss,
                    "tokens": trained.tokens,
                    "steps": trained.steps,
                    "examples-seen": trained.examples,
                    "seconds": trained.seconds,
                    "peak-bytes": trained.peak_bytes,
                    "wire-error": wire_error,
                }
            ),
        }
    )
    if trained.head and not told.keeps_head:
        reply["head"] = to_record(pack_head(trained.head))
    _tell(
        "trained",
        told,
        context,
        rank=adapter.rank,
        examples=len(examples),
        steps=trained.steps,
        loss=trained.loss,
        seconds=trained.seconds,
        bytes_up=len(packed),
    )
    return reply


@app.evaluate()
@_answer
def evaluate(content: RecordDict, context: Context) -> RecordDict:
    """Loss of the model that this client would use, on the examples that it holds out."""
    from client.kept import recall
    from client.site import open_workplace
    from client.starting import starting_factors, with_frozen_tail, with_own_b

    told = read_instruction(content)
    place = open_workplace(context, told.lora)
    check_base(told.base, place.tuned.base.identity)
    examples = place.held_out_examples()
    shapes, rank = place.tuned.shapes, told.rank_of(place.rank)
    shelf = _shelf(context, told)
    merged, start = model_of(content, shapes, rank, told, shelf)
    own: Adapter | None = None
    kept = recall(shelf, told.round)
    if start is not None:
        if told.freezes_tail:
            merged = with_frozen_tail(merged, start, rank)
        own = starting_factors(start, shapes, rank, told.lora.scale_of(rank), told.seed)
        if told.keeps_b:
            own = with_own_b(own, kept)
    head = head_of(content, place.tuned, told, kept)
    tokens = place.settings.evaluation_tokens()
    result = place.tuned.evaluate_global(merged, own, examples, head, tokens)
    _tell("evaluated", told, context, examples=len(examples), loss=result.loss)
    return RecordDict(
        {
            "reply": _stamp(told, place),
            "metrics": MetricRecord(
                {
                    "num-examples": len(examples),
                    "loss": result.loss,
                    "tokens": result.tokens,
                    **{name.replace("_", "-"): value for name, value in result.metrics.items()},
                }
            ),
        }
    )
