"""The keys that concern the federation: method, clients, evaluation, wire."""

from dataclasses import dataclass
from typing import Literal

from settings.keys import key
from settings.knobs import read_knobs


@dataclass(frozen=True)
class StrategySettings:
    """How the server combines the clients' adapters."""

    name: str = key(
        "The aggregation method; `bouquet strategies` lists them. One of your own: "
        "my_package.module:Name, or the name of its entry point."
    )
    knobs: str = key(
        "The method's own knobs: KNOB=VALUE with commas, or each by a key of its own, "
        "strategy.KNOB=VALUE for the method that runs, strategy.NAME.KNOB=VALUE for one of several."
        " `bouquet options strategy` lists them. Empty: as the method has them.",
        check=read_knobs,
    )


@dataclass(frozen=True)
class StartSettings:
    """What a round begins from, where the method itself leaves it open."""

    policy: Literal["auto", "random", "keep-a", "increment", "global"] = key(
        "Factors at the start of a round: random (the FLoRA paper); keep-a (the leading directions "
        "of the newest increment, B zero); increment or global (the leading part of the newest "
        "increment or of all that was merged, taken out of merged). The global model is the same. "
        "auto: the method's own.",
    )
    adapter: str = key(
        "Folder of a PEFT adapter that the run begins from: its delta is merged into the global "
        "model before round one; empty: the base alone."
    )
    optimizer: Literal["fresh", "kept"] = key(
        "Each client's optimizer at the start of a round: fresh, or kept from its last round.",
    )


@dataclass(frozen=True)
class ClientsSettings:
    """Who takes part."""

    count: int = key("Simulated clients.", at_least=1, at_most=100_000)
    fraction: float = key(
        "Share of the clients sampled each round, rounded up to at least one.", above=0, at_most=1
    )
    over_selection: float = key(
        "Ask this many times as many clients as a round needs, and take those that answer first.",
        at_least=1,
        at_most=10,
    )
    weights: Literal["examples", "uniform", "geometric-median"] = key(
        "A client's weight in the mean: its number of examples, the same for all, or by number of "
        "examples the geometric median of the changes, which a minority cannot drag away.",
    )
    head: Literal["auto", "shared", "own"] = key(
        "A classifier's head: averaged by the server (shared), or each client's own, which never "
        "travels. auto: own under personal methods, else shared.",
    )
    min_replies: int = key("A round with fewer usable replies stops the run.", at_least=1)
    min_examples: int = key(
        "A site with fewer training examples does not train: its adapter would be their record. A "
        "site may ask for more with min-examples of its own.",
        at_least=1,
    )
    max_rank: int = key(
        "A site of a higher rank does not take part: the server holds adapters of its rank.",
        at_least=1,
    )
    timeout_seconds: float = key(
        "Deadline of a round: who has not answered by then is left out of it.", above=0
    )
    max_norm_ratio: float = key(
        "A reply whose change is larger than this many times the median of the round's is "
        "excluded (of three replies or more); 0: never.",
        at_least=0,
    )
    clip_norm_ratio: float = key(
        "A larger change than this many times the median is scaled down to it; 0: never.",
        at_least=0,
    )


@dataclass(frozen=True)
class EvaluateSettings:
    """Held-out loss of the global model."""

    server: bool = key("The server evaluates on the global held-out part (needs the base model).")
    clients: bool = key("The clients evaluate on their own held-out parts.")
    trained: bool = key(
        "The server also evaluates each client's model as it comes back, before aggregation."
    )
    every: int = key("Evaluate after every so many rounds, and after the last.", at_least=1)
    batch_tokens: int = key(
        "Most tokens, padding included, of one forward pass of evaluation; 0: as many as a "
        "training step may take, local.batch-size times data.context.",
        at_least=0,
    )
    max_examples: int = key("Evaluate on at most this many examples; 0: all.", at_least=0)


@dataclass(frozen=True)
class WireSettings:
    """How adapters travel."""

    dtype: Literal["float32", "bfloat16", "float16", "int8"] = key(
        "Number format on the wire: float32 is exact, bfloat16 and float16 take half its bytes, "
        "int8 a quarter (with a scale for every 256 values).",
    )


@dataclass(frozen=True)
class StatusSettings:
    """Where the coordinator's other tools learn how the run stands."""

    prometheus: str = key(
        "File for the textfile collector of Prometheus' node exporter, ending in .prom; empty: "
        "none. It lies on the coordinator."
    )
    notify: str = key(
        "Command that the coordinator runs when the run fails, without a shell; it finds "
        "BOUQUET_RUN, BOUQUET_STATE and BOUQUET_WORDS in its environment. Empty: none."
    )
