"""The Flower ClientApp: query, train and evaluate, for any strategy.

The client knows nothing of strategies: it receives the global model, an instruction and a seed, and
answers with an adapter. The same object runs in process, under Flower's simulation and at a site.

    query     -> site: name, rank, base identity, module shapes, number of examples
    train     <- merged, start, head, instruction      -> adapter, head, metrics
    evaluate  <- merged, start, head, instruction      -> metrics
"""

from collections.abc import Callable, MutableMapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from adapters.adapter import Adapter, FloatArray, Shapes, draw
from adapters.algebra import relative_error
from adapters.codec import pack, unpack
from adapters.errors import BouquetError, listing
from adapters.head import pack_head, unpack_head
from adapters.records import from_record, to_record
from client.instruction import Instruction, read_instruction
from settings.site import parse_site

if TYPE_CHECKING:
    from tasks.tuned_model import TunedModel

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


def _tell_holdings(content: RecordDict, context: Context) -> None:
    """A site that keeps what it received says what it has, in whatever it answers."""
    if cache := _cache(context):
        from client.pieces import held_pieces

        for name in {"site", "reply", "failure"} & set(content.config_records):
            content.config_records[name]["holds"] = held_pieces(cache)


def _cache(context: Context) -> Path | None:
    path = context.node_config.get("cache-path")
    return Path(str(path)).expanduser() if path else None


def _shelf(context: Context, told: Instruction) -> MutableMapping[str, bytes]:
    """Where this site keeps what it needs again in this run."""
    from client.shelf import RecordShelf, run_shelf

    cache = _cache(context)
    return RecordShelf(context.state) if cache is None else run_shelf(cache, told.run)


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
                    "modules": list(shapes),
                    "rows": [m for m, _ in shapes.values()],
                    "columns": [n for _, n in shapes.values()],
                    "head": list(head),
                    "head-shapes": ["x".join(map(str, shape)) for shape in head.values()],
                }
            )
        }
    )
    ask = content.get("ask")
    if isinstance(ask, ConfigRecord) and "principal-rank" in ask:
        from tasks.principal import principal_factors

        rank = ask["principal-rank"]
        assert isinstance(rank, int)
        answer["principal"] = to_record(pack(principal_factors(place.tuned, rank)))
    return answer


@app.train()
@_answer
def train(content: RecordDict, context: Context) -> RecordDict:
    """Train for one round and return the factors."""
    from client.memory import recall, remember
    from client.pruning import RestPenalty, kept_rank, pruned
    from client.site import open_workplace
    from client.starting import starting_factors, with_frozen_tail, with_own_b
    from client.training import train as train_locally

    told = read_instruction(content)
    place = open_workplace(context, told.lora)
    _check_base(told.base, place.tuned.base.identity)
    examples = place.training_examples()
    shapes, rank = place.tuned.shapes, told.rank_of(place.rank)
    shelf = _shelf(context, told)
    merged = _merged(content, shapes, told, shelf)
    start = _global_start(content, shapes, rank, told)
    if start is not None and told.freezes_tail:
        merged = with_frozen_tail(merged, start, rank)
    begin = starting_factors(start, shapes, rank, told.lora.scale_of(rank), told.seed)
    kept = recall(shelf, told.round - 1)
    if told.keeps_b:
        begin = with_own_b(begin, kept)
    place.tuned.merge(merged)
    trained = train_locally(
        place.tuned,
        examples,
        begin,
        told.local,
        told.seed,
        told.trains,
        told.lora.dropout,
        head=_head(content, place.tuned, told.start_seed),
        penalty=RestPenalty(told.penalty, kept_rank(rank, told.prune)) if told.prune < 1 else None,
        moments=kept if told.optimizer == "kept" else None,
    )
    adapter = pruned(begin, trained.adapter, told.prune)
    keep = dict(trained.moments)
    if told.keeps_b:
        keep |= {name: factors.b for name, factors in adapter.items()}
    if keep:
        remember(shelf, told.round, keep)
    packed = pack(adapter, told.wire_dtype, told.sends)
    exact = told.wire_dtype == "float32"
    wire_error = 0.0 if exact else relative_error([adapter], [unpack(packed, adapter)])
    reply = RecordDict(
        {
            "adapter": to_record(packed),
            "reply": ConfigRecord({"round": told.round, "base": told.base}),
            "metrics": MetricRecord(
                {
                    "num-examples": len(examples),
                    "loss": trained.loss,
                    "tokens": trained.tokens,
                    "steps": trained.steps,
                    "seconds": trained.seconds,
                    "peak-bytes": trained.peak_bytes,
                    "wire-error": wire_error,
                }
            ),
        }
    )
    if trained.head:
        reply["head"] = to_record(pack_head(trained.head))
    return reply


@app.evaluate()
@_answer
def evaluate(content: RecordDict, context: Context) -> RecordDict:
    """Loss of the model that this client would use, on the examples that it holds out."""
    from client.memory import recall
    from client.site import open_workplace
    from client.starting import starting_factors, with_frozen_tail, with_own_b

    told = read_instruction(content)
    place = open_workplace(context, told.lora)
    _check_base(told.base, place.tuned.base.identity)
    examples = place.held_out_examples()
    shapes, rank = place.tuned.shapes, told.rank_of(place.rank)
    shelf = _shelf(context, told)
    merged = _merged(content, shapes, told, shelf)
    start = _global_start(content, shapes, rank, told)
    own: Adapter | None = None
    if start is not None:
        if told.freezes_tail:
            merged = with_frozen_tail(merged, start, rank)
        own = starting_factors(start, shapes, rank, told.lora.scale_of(rank), told.seed)
        if told.keeps_b:
            own = with_own_b(own, recall(shelf, told.round))
    head = _head(content, place.tuned, told.start_seed)
    result = place.tuned.evaluate_global(merged, own, examples, head)
    return RecordDict(
        {
            "reply": ConfigRecord({"round": told.round, "base": told.base}),
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


def _check_base(wanted: str, own: str) -> None:
    if wanted != own:
        raise BouquetError(
            f"the run's base model is {wanted}, but this site's is {own}: both must be the same "
            "weights; check model.path and the site's model-path"
        )


def _merged(
    content: RecordDict,
    shapes: Shapes,
    told: Instruction,
    shelf: MutableMapping[str, bytes],
) -> Adapter | None:
    """`merged` as it came, or the sum of the pieces that came and those that this site has."""
    if told.pieces is None:
        return _global_part(content, "merged", shapes)
    from client.pieces import sum_of_pieces
    from client.shelf import FolderShelf

    keeps = shelf if isinstance(shelf, FolderShelf) else None
    return _fitting("merged", sum_of_pieces(content, told.pieces, keeps), shapes)


def _global_start(
    content: RecordDict, shapes: Shapes, rank: int, told: Instruction
) -> Adapter | None:
    """`start`; a factor that did not travel is drawn from the run's seed."""
    known = draw(shapes, rank, told.start_seed, scale=1.0) if told.receives != "both" else None
    return _global_part(content, "start", shapes, known)


def _global_part(
    content: RecordDict, name: str, shapes: Shapes, known: Adapter | None = None
) -> Adapter | None:
    record = content.get(name)
    if not isinstance(record, ArrayRecord):
        return None
    packed = from_record(record)
    part = _unpack_once(packed) if known is None else unpack(packed, known)
    return _fitting(name, part, shapes)


def _fitting(name: str, part: Adapter | None, shapes: Shapes) -> Adapter | None:
    if part is not None and (odd := set(part.shapes.items()) ^ set(shapes.items())):
        raise BouquetError(
            f"the run's {name} does not fit lora.target-modules: it differs from what this site "
            f"adapts in {listing(sorted(odd))}"
        )
    return part


@lru_cache(maxsize=2)
def _unpack_once(packed: bytes) -> Adapter:
    """One process that plays many clients decodes the same global model once."""
    return unpack(packed)


def _head(content: RecordDict, tuned: "TunedModel", seed: int) -> dict[str, FloatArray]:
    """The head that was sent, or before there is one that which every site draws alike."""
    record = content.get("head")
    if isinstance(record, ArrayRecord):
        return unpack_head(from_record(record), tuned.head_shapes)
    return tuned.initial_head(seed)
