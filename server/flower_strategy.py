"""Any of Bouquet's strategies as a `flwr.serverapp.strategy.Strategy`.

For people who have a ServerApp of their own: Flower's loop, Bouquet's clients and arithmetic.

    strategy = FlowerStrategy(run_settings(context.run_config))
    result = strategy.start(grid, initial_arrays=ArrayRecord(), num_rounds=3)
    write_peft(strategy.adapter(result.arrays), Path("adapter"), "base")

The ArrayRecord that Flower hands from round to round holds the global model: `merged` and `start`,
each packed as one array. What this loop cannot do is resume; Bouquet's own ServerApp can.
"""

import logging
from collections.abc import Iterable

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerBase

from adapters.adapter import Adapter
from adapters.refactoring import as_factors
from core.errors import BouquetError
from server.admission import admit_replies
from server.attendance import call_roster
from server.broadcast import Asked, ask, broadcast, broadcast_to, received_start, round_messages
from server.combining import combine
from server.evaluation import evaluate_on_clients
from server.guard import guard
from server.mailbox import Mailbox
from server.method import method_of, rules_of
from server.roster import Roster
from server.rounds import begin_model
from server.sampling import sample_cohort
from server.start_adapter import read_start_adapter, with_adapter
from server.telemetry import round_record
from settings.keys import flatten
from settings.run import RunSettings, run_settings
from settings.seeds import derive_seed
from strategies.strategy import GlobalModel
from wire.model import pack_model, unpack_model
from wire.records import STYPE

log = logging.getLogger("bouquet")


class FlowerStrategy(FlowerBase):
    """settings.strategy in Flower's interface; rounds and evaluation are the caller's.

    Raises UsageError in the first round where the clients' ranks do not fit the strategy, and
    BouquetError where a round has fewer usable replies than clients.min-replies.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self._strategy = method_of(settings)
        self._roster: Roster | None = None
        self._cohort: list[Asked] = []
        self._evaluating: list[Asked] = []
        self._sent = broadcast(GlobalModel(), settings.wire.dtype)
        self._model = GlobalModel()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Train messages for this round's cohort; keys in `config` override lora.* and local.*."""
        roster = self._call(grid)
        self._model = (
            _model_from(arrays, roster)
            if arrays
            else with_adapter(
                begin_model(self.settings, self._strategy, roster, Mailbox(grid)),
                read_start_adapter(self.settings, roster.shapes, roster.head_shapes),
            )
        )
        cohort = sample_cohort(
            roster.members, self.settings.clients.fraction, self.settings.seed, server_round
        )
        self._cohort = ask(cohort, self._strategy, self._model, self.settings.clients.head)
        self._sent = broadcast_to(self._cohort, self._model, self.settings.wire.dtype)
        return self._messages(MessageType.TRAIN, self._cohort, server_round, config, roster)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next global model, with loss, noise and bytes as metrics."""
        assert self._roster is not None
        found = admit_replies(
            replies, self._cohort, self._model.start, self._roster, self.settings, server_round
        )
        began = received_start(self._model, self._sent)
        found = guard(found, self._cohort, began, self.settings.clients)
        admitted, rejected = found.replies, found.rejected
        for rejection in rejected:
            log.warning(
                "round %d excludes %s: %s", server_round, rejection.client, rejection.reason
            )
        if len(admitted) < self.settings.clients.min_replies:
            raise BouquetError(f"round {server_round} has only {len(admitted)} usable replies")
        weights = self.settings.clients.weights
        combined = combine(self._strategy, self._model, admitted, self._cohort, self._sent, weights)
        model = combined.aggregated.model
        record = round_record(
            server_round,
            combined,
            model,
            self._cohort,
            self._sent,
            rejected,
            derive_seed(self.settings.seed, server_round, "compared"),
        )
        numbers: dict[str, int | float | list[int] | list[float]] = {
            name.replace("_", "-"): value
            for name, value in record.items()
            if isinstance(value, int | float) and name != "round"
        }
        self._model = model
        return _record_from(model), MetricRecord(numbers)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluate messages for all clients, where evaluate.clients asks for them."""
        if not self.settings.evaluate.clients:
            return []
        roster = self._call(grid)
        asked = ask(roster.members, self._strategy, self._model, self.settings.clients.head)
        self._evaluating = asked
        self._sent = broadcast_to(asked, self._model, self.settings.wire.dtype)
        return self._messages(MessageType.EVALUATE, asked, server_round, config, roster)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Mean held-out loss over clients, weighted by their tokens."""
        assert self._roster is not None
        found, rejected = evaluate_on_clients(
            list(replies), self._evaluating, server_round, self._roster.base
        )
        for rejection in rejected:
            log.warning(
                "round %d excludes %s: %s", server_round, rejection.client, rejection.reason
            )
        loss = found.get("client_held_out_loss")
        return None if loss is None else MetricRecord({"client-held-out-loss": loss})

    def summary(self) -> None:
        """Log what this strategy is."""
        properties = self._strategy.properties
        log.info("%s (%s), exact: %s", properties.title, properties.source, properties.exact)

    def adapter(self, arrays: ArrayRecord) -> Adapter:
        """The whole global model, merged and start together, as one adapter."""
        total = _model_from(arrays, self._roster).total()
        if total is None:
            raise BouquetError("the global model is still the base itself: no round has run")
        return as_factors(total)

    def _call(self, grid: Grid) -> Roster:
        if self._roster is None:
            clients = self.settings.clients
            self._roster = call_roster(
                Mailbox(grid),
                clients.min_replies,
                clients.timeout_seconds,
                rules=rules_of(self.settings, self._strategy),
            )
        return self._roster

    def _messages(
        self,
        kind: str,
        cohort: list[Asked],
        server_round: int,
        config: ConfigRecord,
        roster: Roster,
    ) -> list[Message]:
        known = flatten(self.settings)
        overrides = {name: value for name, value in config.items() if name in known}
        settings = run_settings(known, overrides)  # type: ignore[arg-type]
        return round_messages(kind, cohort, self._sent, settings, server_round, roster.base)


def _record_from(model: GlobalModel) -> ArrayRecord:
    packed = pack_model(model.merged, model.start, model.head, model.state)
    return ArrayRecord(
        {name: Array("uint8", (len(data),), STYPE, data) for name, data in packed.items()}
    )


def _model_from(arrays: ArrayRecord, roster: Roster | None) -> GlobalModel:
    shapes = roster.head_shapes if roster is not None else {}
    return GlobalModel(*unpack_model({n: array.data for n, array in arrays.items()}, shapes))
