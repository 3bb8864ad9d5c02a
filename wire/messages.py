"""What server and clients say to each other: one class a message, written and read here alone.

    query      <- Query                            -> SiteCard (wire/site_card.py)
    train      <- Instruction, the global model    -> TrainReply
    evaluate   <- Instruction, the global model    -> EvaluateReply
                                                   -> Failure, in the place of any of these

`to_records` writes a message, `from_records` reads it. What a client sends is data from a stranger:
its reader refuses with ReplyError whatever is not what it must be.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from core.errors import BouquetError, ReplyError, UsageError, listing, quoted
from settings.keys import flatten, parse
from settings.run import LocalSettings, LoraSettings
from wire.fields import config, metrics, number, shown
from wire.records import from_record, to_record
from wire.rules import CONTROL, LocalRule
from wire.site_card import MAX_EXAMPLES, pieces_held

FAILURE = "failure"
ANSWERS = ("site", "reply", FAILURE)
"""The records in which a client says what it holds."""
QUERY_RECORDS = frozenset({"site", FAILURE})
PRINCIPAL_RECORDS = frozenset({"site", "principal", FAILURE})
TRAIN_RECORDS = frozenset({"reply", "metrics", "adapter", "head", CONTROL, FAILURE})
EVALUATE_RECORDS = frozenset({"reply", "metrics", FAILURE})
"""What a client may answer to each message; a failure alone, in the place of the others."""

SAME_VERSION = "server and site need the same version of bouquet"

MAX_COUNT = 10**12
MAX_BYTES = 10**15
MAX_LOSS = 1e4
"""A nat a token is much; a model that guesses among all of a vocabulary loses 12."""
MAX_SECONDS = 1e9
MAX_ERROR = 1e4
MEASURES = ("accuracy", "macro-f1")
"""What a task may measure beside the loss, each from 0 to 1."""


@dataclass(frozen=True)
class Query:
    """Who are you?"""

    principal_rank: int = 0
    """How many leading singular directions of the base to send; 0: none."""

    def to_records(self) -> RecordDict:
        """The message of a query."""
        asked = {"principal-rank": self.principal_rank} if self.principal_rank else {}
        return RecordDict({"ask": ConfigRecord(asked)})  # type: ignore[arg-type]

    @classmethod
    def from_records(cls, content: RecordDict) -> "Query":
        """The query in a message; one without a record asks for nothing more."""
        ask = content.get("ask")
        rank = ask.get("principal-rank", 0) if isinstance(ask, ConfigRecord) else 0
        return cls(rank if isinstance(rank, int) else 0)


@dataclass(frozen=True)
class Parts:
    """How merged travels in pieces."""

    versions: tuple[str, ...]
    """Of the pieces that merged is the sum of, in their order."""
    kinds: tuple[str, ...]
    """What each is to the sum: plus, minus or step (adapters/terms.py)."""
    start: str = ""
    """The version of the piece that `start` is; empty: it travels by itself, or there is none."""

    @property
    def needed(self) -> list[str]:
        """The versions that a client must have, each once."""
        return [*dict.fromkeys([*self.versions, *([self.start] if self.start else [])])]


@dataclass(frozen=True)
class Instruction:
    """One round's orders to one client; nothing in it names a method."""

    run: str
    """What a site files under what it keeps of this run."""
    round: int
    base: str
    """The identity of the base model that the run is on."""
    version: str
    """Names the global model that came, in logs."""
    seed: int
    start_seed: int
    """What `start` leaves out is drawn from it, the same on every site."""
    wire_dtype: str
    optimizer: str
    """`fresh`, or `kept` from this client's last round."""
    rule: LocalRule
    lora: LoraSettings
    local: LocalSettings
    parts: Parts | None = None
    """None: merged, where there is one, came whole."""

    def to_records(self) -> RecordDict:
        """The message, without the global model."""
        told: dict[str, Any] = {
            "run": self.run,
            "round": self.round,
            "base": self.base,
            "version": self.version,
            "seed": self.seed,
            "start-seed": self.start_seed,
            "wire-dtype": self.wire_dtype,
            "start.optimizer": self.optimizer,
            **flatten(self.rule, "rule."),
            **flatten(self.lora, "lora."),
            **flatten(self.local, "local."),
        }
        if self.parts is not None:
            told["pieces"] = list(self.parts.versions)
            told["piece-kinds"] = list(self.parts.kinds)
            told["start-piece"] = self.parts.start
        return RecordDict({"instruction": ConfigRecord(told)})

    @classmethod
    def from_records(cls, content: RecordDict) -> "Instruction":
        """The orders in a message; BouquetError where the server is of another version."""
        try:
            told: Any = content["instruction"]
            return cls(
                run=told["run"],
                round=told["round"],
                base=told["base"],
                version=told["version"],
                seed=told["seed"],
                start_seed=told["start-seed"],
                wire_dtype=told["wire-dtype"],
                optimizer=told["start.optimizer"],
                rule=_rule_of(told),
                lora=parse(LoraSettings, told, "lora."),
                local=parse(LocalSettings, told, "local."),
                parts=parts_in(content),
            )
        except KeyError as error:
            raise BouquetError(f"the server's message lacks {error}: {SAME_VERSION}") from None

    def rank_of(self, own: int) -> int:
        """The rank to train: the client's own, unless it is told less."""
        return min(own, self.rule.rank) if self.rule.rank else own


def _rule_of(told: Any) -> LocalRule:
    try:
        return parse(LocalRule, told, "rule.")
    except UsageError as error:
        raise BouquetError(f"{SAME_VERSION}: it asks what this one cannot do ({error})") from None


def parts_in(content: RecordDict) -> Parts | None:
    """How merged travels in pieces, by the instruction in a message; None where it comes whole."""
    record = content.get("instruction")
    if not isinstance(record, ConfigRecord) or "pieces" not in record:
        return None
    told: Any = record
    return Parts(tuple(told["pieces"]), tuple(told["piece-kinds"]), told["start-piece"])


@dataclass(frozen=True)
class Stamp:
    """What a reply belongs to."""

    round: int
    base: str
    data: str = ""
    """Hash of the data that it was made of; empty where the client did not say."""
    holds: frozenset[str] | None = None
    """The pieces of merged that the client has, by version; None: it does not say."""

    def to_record(self) -> ConfigRecord:
        """The record `reply`."""
        told: dict[str, Any] = {"round": self.round, "base": self.base, "data": self.data}
        if self.holds is not None:
            told["holds"] = sorted(self.holds)
        return ConfigRecord(told)

    @classmethod
    def from_records(
        cls, content: RecordDict, server_round: int, base: str, data: str = ""
    ) -> "Stamp":
        """The stamp of a reply to this round, on this base, of these data; ReplyError otherwise.

        data: the hash that the client told when it was asked who it is; empty where it told none.
        """
        told = config(content, "reply")
        came = told.get("round")
        if type(came) is not int or came != server_round:
            raise ReplyError(f"expected a reply to round {server_round}; got one to {shown(came)}")
        if told.get("base") != base:
            raise ReplyError(f"trained on base {shown(told.get('base'))}; the run's is {base!r}")
        if data and told.get("data") != data:
            raise ReplyError(
                f"its data changed since the run began (hash {shown(told.get('data'))}, before "
                f"{data!r}): bring them back, or begin a new run"
            )
        return cls(server_round, base, data, pieces_held(told))


def _measured(most: float, optional: bool = False, **default: Any) -> Any:
    """A field of metrics: a number from 0 to `most`."""
    return field(metadata={"most": most, "optional": optional}, **default)


@dataclass(frozen=True)
class TrainMetrics:
    """What a client counted and measured in a round of training."""

    num_examples: int = _measured(MAX_EXAMPLES)
    loss: float = _measured(MAX_LOSS)
    """Mean per target token over the steps of the round, before each step."""
    tokens: int = _measured(MAX_COUNT)
    """Target tokens trained on."""
    steps: int = _measured(MAX_COUNT)
    seconds: float = _measured(MAX_SECONDS)
    peak_bytes: int = _measured(MAX_BYTES)
    """Most memory held on the GPU; 0 on the CPU."""
    examples_seen: int | None = _measured(MAX_COUNT, optional=True, default=None)
    """Examples trained on, each as often as it was in a batch; None where nobody counted."""
    wire_error: float = _measured(MAX_ERROR, optional=True, default=0.0)
    """||delta - delta as sent||_F / ||delta||_F, from the number format on the wire."""

    def to_record(self) -> MetricRecord:
        """The record `metrics`."""
        told = {e.name.replace("_", "-"): getattr(self, e.name) for e in fields(self)}
        return MetricRecord({name: value for name, value in told.items() if value is not None})

    def with_wire_error(self, error: float) -> "TrainMetrics":
        """The same numbers with this one."""
        return replace(self, wire_error=error)

    @classmethod
    def from_records(cls, content: RecordDict, least_examples: int = 0) -> "TrainMetrics":
        """The metrics in a reply; ReplyError where one is missing or out of bounds."""
        told = metrics(content)
        found: dict[str, Any] = {}
        for entry in fields(cls):
            name = entry.name.replace("_", "-")
            if entry.metadata["optional"] and name not in told:
                continue
            is_whole = entry.type is not float
            low = least_examples if name == "num-examples" else 0
            value = number(told, name, low, entry.metadata["most"], is_whole)
            found[entry.name] = int(value) if is_whole else value
        return cls(**found)


@dataclass(frozen=True, eq=False)
class TrainReply:
    """What a client made of its round."""

    stamp: Stamp
    adapter: bytes
    """The trained factors that travel, packed (wire/codec.py)."""
    metrics: TrainMetrics
    head: bytes | None = None
    """What trained beside them, packed (wire/head.py)."""
    control: bytes | None = None
    """By how much the client's control variate changed, packed."""

    @property
    def num_bytes(self) -> int:
        """Of all that is packed in it."""
        return sum(len(part) for part in (self.adapter, self.head, self.control) if part)

    def to_records(self) -> RecordDict:
        """The reply to a train message."""
        content: dict[str, Any] = {
            "reply": self.stamp.to_record(),
            "adapter": to_record(self.adapter),
            "metrics": self.metrics.to_record(),
        }
        if self.head is not None:
            content["head"] = to_record(self.head)
        if self.control is not None:
            content[CONTROL] = to_record(self.control)
        return RecordDict(content)

    @classmethod
    def from_records(
        cls,
        content: RecordDict,
        stamp: Stamp,
        adapter_bytes: int,
        head_bytes: int | None = None,
        control_bytes: int | None = None,
        least_examples: int = 0,
    ) -> "TrainReply":
        """The reply under a stamp that was read before; ReplyError or AdapterError otherwise.

        adapter_bytes, head_bytes, control_bytes: the most that each may take; None: it is not sent.
        """
        adapter = from_record(content.get("adapter"), limit=adapter_bytes)
        head = None
        if head_bytes is not None:
            head = from_record(content.get("head"), limit=head_bytes)
        control = None
        if control_bytes is not None:
            control = from_record(content.get(CONTROL), limit=control_bytes)
        metrics = TrainMetrics.from_records(content, least_examples)
        return cls(stamp, adapter, metrics, head, control)


@dataclass(frozen=True)
class EvaluateReply:
    """What the global model is worth on a client's held-out examples."""

    stamp: Stamp
    num_examples: int
    loss: float
    tokens: int
    measures: Mapping[str, float] = field(default_factory=dict)
    """What the task measures beside the loss, by name in kebab-case."""

    def to_records(self) -> RecordDict:
        """The reply to an evaluate message."""
        told = {"num-examples": self.num_examples, "loss": self.loss, "tokens": self.tokens}
        return RecordDict(
            {
                "reply": self.stamp.to_record(),
                "metrics": MetricRecord({**told, **self.measures}),
            }
        )

    @classmethod
    def from_records(cls, content: RecordDict, stamp: Stamp) -> "EvaluateReply":
        """The reply under a stamp that was read before; ReplyError otherwise."""
        told = {"num-examples": 0, "tokens": 0, **metrics(content)}
        tokens = int(number(told, "tokens", 0, MAX_COUNT, is_whole=True))
        if not tokens or "loss" not in told:
            raise ReplyError("an evaluation needs a loss and tokens above zero")
        return cls(
            stamp,
            int(number(told, "num-examples", 0, MAX_EXAMPLES, is_whole=True)),
            number(told, "loss", 0, MAX_LOSS),
            tokens,
            {name: number(told, name, 0, 1.0) for name in MEASURES if name in told},
        )


@dataclass(frozen=True)
class Failure:
    """Why a client cannot answer."""

    reason: str
    client: str = ""
    """What it calls itself."""
    holds: frozenset[str] | None = None
    """The pieces of merged that it has, by version; None: it does not say."""

    def to_records(self) -> RecordDict:
        """The answer in the place of any other."""
        told: dict[str, Any] = {"reason": self.reason, "client": self.client}
        if self.holds is not None:
            told["holds"] = sorted(self.holds)
        return RecordDict({FAILURE: ConfigRecord(told)})

    @classmethod
    def from_records(cls, content: RecordDict) -> "Failure | None":
        """The failure in an answer, its words cut and escaped; None where there is none.

        What it holds is read by `holdings_in`.

        >>> Failure.from_records(Failure("no data", "oslo").to_records())
        Failure(reason='no data', client='oslo', holds=None)
        """
        if FAILURE not in content:
            return None
        record = content[FAILURE]
        reason, client = record.get("reason"), record.get("client")
        return cls(
            quoted(reason) if isinstance(reason, str) else "a failure without a reason",
            quoted(client) if isinstance(client, str) else "",
        )


def records_of(message: Message, allowed: frozenset[str]) -> RecordDict:
    """The records of an answer; ReplyError for a failure, or one that nobody asked for."""
    if message.has_error():
        error = message.error
        raise ReplyError(f"the client failed: {quoted(error.reason or error.code)}")
    if not message.has_content():
        raise ReplyError("the answer is empty: it holds neither records nor an error")
    content = message.content
    if failure := Failure.from_records(content):
        raise ReplyError(f"the client reports: {failure.reason}")
    unasked = sorted(shown(name) for name in content if name not in allowed)
    if unasked:
        one = len(unasked) == 1
        raise ReplyError(
            f"the record{'' if one else 's'} {listing(unasked)} {'was' if one else 'were'} not "
            "asked for"
        )
    return content


def holdings_in(content: RecordDict) -> frozenset[str] | None:
    """The pieces that a client says it has, whatever else its reply or failure holds.

    None where it does not say; ReplyError where it says it in a way that makes no sense.
    """
    for name in ANSWERS:
        record = content.get(name)
        if isinstance(record, ConfigRecord):
            return pieces_held(record)
    return None
