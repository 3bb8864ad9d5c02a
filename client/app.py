"""The Flower ClientApp: query, train and evaluate, for any strategy.

The client knows nothing of strategies: it receives the global model, an instruction and a seed, and
answers with an adapter. The same object runs in process, under Flower's simulation and at a site.
What is said is written in wire/messages.py.
"""

from typing import TYPE_CHECKING

from flwr.app import Context, RecordDict

from adapters.pruning import kept_rank, pruned
from client.answering import client_app, name_of, shelf_of
from client.job import Job, open_job
from client.received import check_base
from core.events import log, log_to_stdout, logfmt
from wire.codec import pack
from wire.messages import EvaluateReply, Instruction, Query, TrainMetrics, TrainReply
from wire.site_card import SiteCard

if TYPE_CHECKING:
    from client.site import Workplace


def query(asked: Query, context: Context) -> SiteCard:
    """Who this site is, and the shapes of what it would train.

    Asked for it, also the leading singular directions of the base weights.
    """
    from client.site import open_workplace

    place = open_workplace(context)
    principal = None
    if asked.principal_rank:
        from models.principal import principal_factors

        principal = pack(principal_factors(place.tuned, asked.principal_rank))
    return SiteCard(
        client=place.site.name,
        number=place.site.number,
        rank=place.rank,
        num_examples=len(place.training_examples()),
        base=place.tuned.base.identity,
        shapes=tuple((name, m, n) for name, (m, n) in place.tuned.shapes.items()),
        head_shapes=tuple(place.tuned.head_shapes.items()),
        labels=tuple(place.tuned.labels),
        data=place.part.fingerprint,
        template=place.part.template,
        principal=principal,
    )


def train(told: Instruction, content: RecordDict, context: Context) -> TrainReply:
    """Train for one round and return the factors."""
    from client.drift import ControlVariates, Proximal
    from client.pruning import RestPenalty
    from client.training import Penalty
    from client.training import train as train_locally

    place, job = _open(told, content, context, told.round - 1)
    examples = place.training_examples()
    place.tuned.merge(job.frozen)
    rule = told.rule
    least = kept_rank(job.rank, rule.prune, rule.min_rank)
    penalties: list[Penalty] = []
    if least < job.rank:
        penalties.append(RestPenalty(rule.penalty, least))
    if rule.proximal:
        penalties.append(Proximal(rule.proximal))
    control = ControlVariates(job.control, job.own_control) if rule.control else None
    trained = train_locally(
        place.tuned,
        examples,
        job.begin,
        told.local,
        told.seed,
        rule.trains,
        told.lora.dropout,
        head=job.head_of(place.tuned.head_shapes) or place.tuned.initial_head(told.start_seed),
        penalties=penalties,
        correct=control,
        moments=job.kept if told.optimizer == "kept" else None,
    )
    adapter = pruned(job.begin, trained.adapter, least)
    metrics = TrainMetrics(
        num_examples=len(examples),
        loss=trained.loss,
        tokens=trained.tokens,
        steps=trained.steps,
        seconds=trained.seconds,
        peak_bytes=trained.peak_bytes,
        examples_seen=trained.examples,
    )
    reply = job.reply(
        adapter,
        metrics,
        place.part.fingerprint,
        trained.head,
        trained.moments,
        control.mean() if control else None,
    )
    _tell(
        "trained",
        told,
        context,
        rank=adapter.rank,
        examples=len(examples),
        steps=trained.steps,
        loss=trained.loss,
        seconds=trained.seconds,
        bytes_up=reply.num_bytes,
    )
    return reply


def evaluate(told: Instruction, content: RecordDict, context: Context) -> EvaluateReply:
    """Loss of the model that this client would use, on the examples that it holds out."""
    place, job = _open(told, content, context, told.round)
    examples = place.held_out_examples()
    head = job.head_of(place.tuned.head_shapes) or place.tuned.initial_head(told.start_seed)
    result = place.tuned.evaluate_global(
        job.frozen,
        None if job.start is None else job.begin,
        examples,
        head,
        place.settings.evaluation_tokens(),
    )
    _tell("evaluated", told, context, examples=len(examples), loss=result.loss)
    return EvaluateReply(
        job.stamp(place.part.fingerprint),
        num_examples=len(examples),
        loss=result.loss,
        tokens=result.tokens,
        measures={name.replace("_", "-"): value for name, value in result.metrics.items()},
    )


def _open(
    told: Instruction, content: RecordDict, context: Context, up_to_round: int
) -> tuple["Workplace", Job]:
    """The site with its model and data, and what it is asked to do."""
    from client.site import open_workplace

    place = open_workplace(context, told.lora)
    check_base(told.base, place.tuned.base.identity)
    shelf = shelf_of(context, told.run)
    return place, open_job(content, told, place.tuned.shapes, place.rank, shelf, up_to_round)


def _tell(event: str, told: Instruction, context: Context, **numbers: object) -> None:
    """A line in the site's log; simulated clients, which have no name, say nothing."""
    if "name" in context.node_config:
        log_to_stdout()
        who = {"node": context.node_id, "client": name_of(context)}
        log.info(logfmt(event, round=told.round, version=told.version, **who, **numbers))


app = client_app(query, train, evaluate)
