"""One federation on one machine, in process."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, RecordDict

from core.errors import UsageError
from journal.run_folder import RunFolder, next_output, peek_state
from journal.state import check_format
from server.method import has_own_models, method_of
from server.start_adapter import read_start_adapter
from settings.keys import as_list, flatten
from settings.run import EMBEDDED, RunSettings
from settings.site import client_name
from simulations.grid import RUN_ID, SERVER_NODE, InProcessGrid
from simulations.holdings import open_holdings
from strategies.registry import refuse_ranks
from strategies.strategy import Strategy

if TYPE_CHECKING:
    from models.tuned_model import TunedModel


@dataclass(frozen=True)
class Plan:
    """What a simulation is about to do; every number is counted, not estimated."""

    settings: RunSettings
    """Those of the run, with what the data decide: the order of the labels."""
    model: str
    parameters: int
    modules: int
    device: str
    files: list[str]
    """What is trained on."""
    train_examples: list[int]
    held_out_examples: int
    steps: int
    """Optimizer steps that the largest client takes a round."""
    epoch_steps: int
    """Steps that its epochs would take without local.max-steps."""
    held_out_by_clients: int
    """Examples that the clients hold out of their parts."""
    counts: Mapping[str, int]
    """Rows and training examples by what became of them: tasks/reasons.py has the reasons."""
    held_out_counts: Mapping[str, int] = field(default_factory=dict)
    """The same of the examples that the server evaluates on."""
    classes: Mapping[str, int] = field(default_factory=dict)
    """Label -> examples to train on, in the order of the classes."""
    found: tuple[str, ...] = ()
    """In which fields the examples were found, where no key names them."""
    test_files: tuple[str, ...] = ()
    """The test set of its own."""
    unused: int = 0
    """Examples that are held out beside such a test set, and evaluated by nobody."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Each file with its hash: simulations/data_record.py."""
    notes: tuple[str, ...] = ()
    """What LoRA does not reach, and the adapter that the run begins from."""


def prepare(settings: RunSettings, on_phase: Callable[[str], None] = lambda phase: None) -> Plan:
    """Load model and data and check that the run can be done, before anything is written.

    Raises UsageError for whatever cannot work: ranks, target modules, fields, empty clients, a run
    to go on with whose data have changed.
    """
    strategy = method_of(settings)
    ranks = {client_name(k): rank for k, rank in enumerate(settings.ranks())}
    refuse_ranks(settings.strategy.name, strategy, ranks)
    _refuse_unheld(settings, strategy)
    resumes = settings.resume and settings.output != ""
    if resumes:
        check_format(Path(settings.output) / "state")
    if settings.model.path != EMBEDDED:
        from models.model_files import find_model

        find_model(settings.model.path)  # a mistyped name is known before torch is imported
    from journal.data_files import refuse_changed_data
    from server.data_record import data_record
    from tasks.labels import label_names
    from tasks.partition import federate_anew, global_held_out

    data, clients, seed, task = (
        settings.data,
        settings.clients.count,
        settings.seed,
        settings.task,
    )
    on_phase("reading the data")
    labels = label_names(data, task, seed=seed)
    if labels:
        data = replace(data, labels=as_list(labels))
        settings = replace(settings, data=data)
    federation = federate_anew(data, clients, seed, task)
    record = data_record(federation, data.chat_template_file)
    if resumes:
        kept = RunFolder(Path(settings.output)).data()
        refuse_changed_data(kept or {}, record, settings.output)
    test = (
        global_held_out(data, clients, seed, settings.evaluate.max_examples, task)
        if settings.evaluate.server
        else None
    )
    on_phase("importing torch, transformers and peft")  # what is wrong above is known without them
    from client.training import plan_steps
    from models.tuned_model import resident_model

    on_phase("loading the base model")
    tuned = resident_model(settings.model, settings.lora, labels=labels)
    for rank in ranks.values():
        tuned.check_rank(rank)
    if (highest := max(ranks.values())) > settings.clients.max_rank:
        raise UsageError(
            f"--ranks has {highest} and clients.max-rank is {settings.clients.max_rank}: train a "
            f"lower rank, or allow it with clients.max-rank={highest}"
        )
    if settings.local.checkpointing:
        tuned.check_checkpointing()
    notes = [tuned.left_out] if tuned.left_out else []
    if settings.start.adapter:
        notes.append(_start_adapter(settings, tuned, labels))
    on_phase("tokenizing")
    held_out = Counter(federation.test_counts)
    if test is not None:
        held_out += tuned.encode(test, data).counts
    counts = Counter(federation.counts)
    sizes = []
    for number, part in enumerate(federation.parts):
        try:
            encoding = tuned.encode(part.train, data)
        except UsageError as error:
            raise UsageError(f"{client_name(number)}: {error}") from None
        sizes.append(len(encoding.examples))
        counts += encoding.counts
    train = [example for part in federation.parts for example in part.train]
    return Plan(
        settings=settings,
        model=settings.model.path,
        parameters=tuned.model.num_parameters(),
        modules=len(tuned.targets),
        device=str(tuned.device),
        files=[EMBEDDED]
        if data.path == EMBEDDED
        else [source.path for source in federation.sources],
        train_examples=sizes,
        held_out_examples=len(federation.held_out),
        steps=plan_steps(max(sizes), settings.local),
        epoch_steps=plan_steps(max(sizes), replace(settings.local, max_steps=0)),
        held_out_by_clients=sum(len(part.held_out) for part in federation.parts),
        counts=counts,
        held_out_counts=held_out,
        classes=_classes(labels, [example.response for example in train]),
        found=federation.found,
        test_files=tuple(source.path for source in federation.tests),
        unused=federation.unused,
        data=record,
        notes=tuple(notes),
    )


def _classes(labels: Sequence[str], found: Sequence[str]) -> dict[str, int]:
    counted = Counter(found)
    return {label: counted[label] for label in labels}


def _start_adapter(settings: RunSettings, tuned: "TunedModel", labels: Sequence[str]) -> str:
    """A line about the adapter that the run begins from, which is read and checked for it."""
    words = f"begins from base + adapter {settings.start.adapter}"
    if peek_state(settings) is not None:
        return f"{words}, which the saved state holds"
    found = read_start_adapter(settings, tuned.shapes, tuned.head_shapes, labels)
    assert found is not None
    base = f", made for {found.base_model}" if found.base_model else ""
    return f"{words}: rank {found.adapter.rank} on {found.modules} modules{base}"


def _refuse_unheld(settings: RunSettings, strategy: Strategy) -> None:
    """UsageError where clients are to evaluate on nothing."""
    if settings.data.client_held_out_share() > 0:
        return
    if strategy.properties.personal:
        raise UsageError(
            f"{settings.strategy.name} has no global model: each client is evaluated on what it "
            "holds out itself. Set data.client-held-out, such as 0.1"
        )
    if has_own_models(settings, strategy):
        raise UsageError(
            "clients.head=own leaves no whole global model: each client is evaluated on what it "
            "holds out itself, with its own head. Set data.client-held-out, such as 0.1"
        )
    if settings.evaluate.clients:
        raise UsageError(
            "evaluate.clients=true, but the clients hold nothing out: set data.client-held-out, "
            "such as 0.1, or evaluate.clients=false"
        )


def simulate(
    settings: RunSettings,
    on_message: Callable[[str, int], None] = lambda kind, client: None,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Run the ServerApp against in-process clients; the observer in force hears of each round.

    on_message: called with (message type, client number) as each client starts on a message.
    data: each file with its hash, as `prepare` counted them; a resumed run compares.
    """
    from client.app import app as client_app
    from server.app import app as server_app

    if settings.clients.min_replies > settings.clients.count:
        raise UsageError(
            f"clients.min-replies is {settings.clients.min_replies}, but there are only "
            f"{settings.clients.count} clients"
        )
    settings = replace(settings, output=settings.output or str(next_output(settings)))
    folder = RunFolder(Path(settings.output))
    if not (settings.resume and (folder.path / "config.toml").is_file()):
        folder.create(settings, data)
    run_config = flatten(replace(settings, resume=True))
    keep = Path(settings.output) / "clients"
    grid = InProcessGrid(
        client_app,
        settings.clients.count,
        run_config,
        on_message,
        keep,
        holdings=open_holdings(settings, keep),
    )
    server_app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), dict(run_config)))
