"""One federation on one machine, in process."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, RecordDict

from adapters.errors import UsageError
from server.method import method_of
from server.run_folder import next_output, peek_state
from server.start_adapter import read_start_adapter
from settings.keys import flatten
from settings.run import EMBEDDED, RunSettings
from settings.site import client_name
from simulations.grid import RUN_ID, SERVER_NODE, InProcessGrid
from strategies.registry import refuse_ranks

if TYPE_CHECKING:
    from tasks.tuned_model import TunedModel


@dataclass(frozen=True)
class Plan:
    """What a simulation is about to do; every number is counted, not estimated."""

    model: str
    parameters: int
    modules: int
    device: str
    train_examples: list[int]
    held_out_examples: int
    steps: int
    """Optimizer steps that the largest client takes a round."""
    epoch_steps: int
    """Steps that its epochs would take without local.max-steps."""
    cut: int
    """Training examples whose response lost its end to the context."""
    dropped: int
    """Training examples that were left out."""
    warnings: list[str]
    """What befell training examples on their way into tokens, a line for each reason."""
    notes: tuple[str, ...] = ()
    """What LoRA does not reach, and the adapter that the run begins from."""


def prepare(settings: RunSettings, on_phase: Callable[[str], None] = lambda phase: None) -> Plan:
    """Load model and data and check that the run can be done, before anything is written.

    Raises UsageError for whatever cannot work: ranks, target modules, fields, empty clients.
    """
    strategy = method_of(settings)
    ranks = {client_name(k): rank for k, rank in enumerate(settings.ranks())}
    refuse_ranks(settings.strategy.name, strategy, ranks)
    if settings.model.path != EMBEDDED:
        from tasks.model_files import find_model

        find_model(settings.model.path)  # a mistyped name is known before torch is imported
    on_phase("importing torch, transformers and peft")
    from client.training import plan_steps
    from tasks.classification import label_names
    from tasks.partition import federate, global_held_out
    from tasks.reasons import count_lines
    from tasks.tuned_model import resident_model

    on_phase("loading the base model")
    labels = label_names(settings.data, settings.task)
    tuned = resident_model(settings.model, settings.lora, labels=labels)
    for rank in ranks.values():
        tuned.check_rank(rank)
    notes = [tuned.left_out] if tuned.left_out else []
    if settings.start.adapter:
        notes.append(_start_adapter(settings, tuned, labels))
    on_phase("reading the data")
    federation = federate(settings.data, settings.clients.count, settings.seed, settings.task)
    if settings.evaluate.server:
        tuned.encode(
            global_held_out(
                settings.data,
                settings.clients.count,
                settings.seed,
                settings.evaluate.max_examples,
                settings.task,
            ),
            settings.data,
        )
    on_phase("tokenizing")
    encodings = [tuned.encode(part.train, settings.data) for part in federation.parts]
    sizes = [len(encoding.examples) for encoding in encodings]
    counts = sum((Counter(encoding.counts) for encoding in encodings), Counter[str]())
    return Plan(
        model=settings.model.path,
        parameters=sum(parameter.numel() for parameter in tuned.model.parameters()),
        modules=len(tuned.targets),
        device=str(tuned.device),
        train_examples=sizes,
        held_out_examples=len(federation.held_out),
        steps=plan_steps(max(sizes), settings.local),
        epoch_steps=plan_steps(max(sizes), replace(settings.local, max_steps=0)),
        cut=sum(encoding.cut for encoding in encodings),
        dropped=sum(encoding.dropped for encoding in encodings),
        warnings=count_lines(counts, settings.data),
        notes=tuple(notes),
    )


def _start_adapter(settings: RunSettings, tuned: "TunedModel", labels: Sequence[str]) -> str:
    """A line about the adapter that the run begins from, which is read and checked for it."""
    words = f"begins from base + adapter {settings.start.adapter}"
    if peek_state(settings) is not None:
        return f"{words}, which the saved state holds"
    found = read_start_adapter(settings, tuned.shapes, tuned.head_shapes, labels)
    assert found is not None
    base = f", made for {found.base_model}" if found.base_model else ""
    return f"{words}: rank {found.adapter.rank} on {found.modules} modules{base}"


def simulate(
    settings: RunSettings, on_message: Callable[[str, int], None] = lambda kind, client: None
) -> None:
    """Run the ServerApp against in-process clients; the observer in force hears of each round.

    on_message: called with (message type, client number) as each client starts on a message.
    """
    from client.app import app as client_app
    from server.app import app as server_app

    if settings.clients.min_replies > settings.clients.count:
        raise UsageError(
            f"clients.min-replies is {settings.clients.min_replies}, but there are only "
            f"{settings.clients.count} clients"
        )
    settings = replace(settings, output=settings.output or str(next_output(settings)))
    run_config = flatten(settings)
    keep = Path(settings.output) / "clients"
    grid = InProcessGrid(client_app, settings.clients.count, run_config, on_message, keep)
    server_app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), dict(run_config)))
