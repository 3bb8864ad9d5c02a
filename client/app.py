"""The Flower ClientApp: query, train and evaluate, for any strategy.

The client knows nothing of strategies: it receives the global model, an instruction and a seed, and
answers with an adapter. The same object runs in process, under Flower's simulation and at a site.

    query     -> site: name, rank, base identity, module shapes, number of examples
    train     <- merged, start, instruction      -> adapter, metrics
    evaluate  <- merged, start, instruction      -> metrics
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from adapters.adapter import Adapter, Shapes
from adapters.codec import pack, unpack
from adapters.errors import BouquetError, listing
from adapters.records import from_record, to_record
from settings.keys import parse
from settings.run import LocalSettings, LoraSettings
from settings.site import parse_site

app = ClientApp()


def _answer(handler: Callable[[RecordDict, Context], RecordDict]) -> Callable[..., Message]:
    """A BouquetError becomes a reply that names the reason, so that the server can log it."""

    def answer(message: Message, context: Context) -> Message:
        try:
            content = handler(message.content, context)
        except BouquetError as error:
            failure = ConfigRecord({"reason": str(error), "client": _name(context)})
            content = RecordDict({"failure": failure})
        return Message(content, reply_to=message)

    return answer


def _name(context: Context) -> str:
    """What this site is called, even where its node config is what failed."""
    try:
        return parse_site(context.node_config).name
    except BouquetError:
        return str(context.node_config.get("name", f"node {context.node_id}"))


@app.query()
@_answer
def query(content: RecordDict, context: Context) -> RecordDict:
    """Who this site is, and the shapes of what it would train."""
    from client.site import open_workplace

    place = open_workplace(context)
    shapes = place.tuned.shapes
    return RecordDict(
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
                }
            )
        }
    )


@app.train()
@_answer
def train(content: RecordDict, context: Context) -> RecordDict:
    """Train for one round and return the factors."""
    from client.site import open_workplace, starting_factors
    from client.training import train as train_locally

    told = _read_instruction(content)
    place = open_workplace(context, told.lora)
    _check_base(told.base, place.tuned.base.identity)
    examples = place.training_examples()
    place.tuned.merge(_global_part(content, "merged", place.tuned.shapes))
    trained = train_locally(
        place.tuned,
        examples,
        starting_factors(
            _global_part(content, "start", place.tuned.shapes),
            place.tuned.shapes,
            place.rank,
            told.lora.scale_of(place.rank),
            told.seed,
        ),
        told.local,
        told.seed,
        told.trains,
        told.lora.dropout,
    )
    return RecordDict(
        {
            "adapter": to_record(pack(trained.adapter, told.wire_dtype)),
            "reply": ConfigRecord({"round": told.round, "base": told.base}),
            "metrics": MetricRecord(
                {
                    "num-examples": len(examples),
                    "loss": trained.loss,
                    "tokens": trained.tokens,
                    "steps": trained.steps,
                    "seconds": trained.seconds,
                    "peak-bytes": trained.peak_bytes,
                }
            ),
        }
    )


@app.evaluate()
@_answer
def evaluate(content: RecordDict, context: Context) -> RecordDict:
    """Loss of the global model on the examples that this site holds out."""
    from client.site import open_workplace

    told = _read_instruction(content)
    place = open_workplace(context, told.lora)
    _check_base(told.base, place.tuned.base.identity)
    examples = place.held_out_examples()
    merged, start = (
        _global_part(content, name, place.tuned.shapes) for name in ("merged", "start")
    )
    result = place.tuned.evaluate_global(merged, start, examples)
    return RecordDict(
        {
            "reply": ConfigRecord({"round": told.round, "base": told.base}),
            "metrics": MetricRecord(
                {"num-examples": len(examples), "loss": result.loss, "tokens": result.tokens}
            ),
        }
    )


@dataclass(frozen=True)
class Instruction:
    """What the server tells a client to do."""

    round: int
    seed: int
    trains: str
    base: str
    wire_dtype: str
    lora: LoraSettings
    local: LocalSettings


def _read_instruction(content: RecordDict) -> Instruction:
    try:
        told: Any = content["instruction"]
        return Instruction(
            round=told["round"],
            seed=told["seed"],
            trains=told["trains"],
            base=told["base"],
            wire_dtype=told["wire-dtype"],
            lora=parse(LoraSettings, told, "lora."),
            local=parse(LocalSettings, told, "local."),
        )
    except KeyError as error:
        raise BouquetError(
            f"the server's message lacks {error}: server and site need the same version of bouquet"
        ) from None


def _check_base(wanted: str, own: str) -> None:
    if wanted != own:
        raise BouquetError(
            f"the run's base model is {wanted}, but this site's is {own}: both must be the same "
            "weights; check model.path and the site's model-path"
        )


def _global_part(content: RecordDict, name: str, shapes: Shapes) -> Adapter | None:
    record = content.get(name)
    if not isinstance(record, ArrayRecord):
        return None
    part = _unpack_once(from_record(record))
    if odd := set(part.shapes.items()) ^ set(shapes.items()):
        raise BouquetError(
            f"the run's {name} does not fit lora.target-modules: it differs from what this site "
            f"adapts in {listing(sorted(odd))}"
        )
    return part


@lru_cache(maxsize=2)
def _unpack_once(packed: bytes) -> Adapter:
    """One process that plays many clients decodes the same global model once."""
    return unpack(packed)
