"""The options that describe a job: what is federated, how clients train, which settings besides.

Each is a type that a command gives to its parameter of the same meaning; `job_layer` turns what
came into one layer of the configuration.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from settings.keys import Value, as_assignment, read_assignment
from settings.run import parse_ranks
from strategies.registry import STRATEGIES

WHAT, TRAINING, RUN = "What is federated", "Local training", "The run"
MORE_KEYS = (
    "Every other setting is a key: [cyan]--set local.batch-size=8[/]. "
    "[cyan]bouquet options[/] lists all of them."
)

StrategyOption = Annotated[
    str | None,
    typer.Option("--strategy", "-s", help=", ".join(STRATEGIES) + ".", rich_help_panel=WHAT),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        help="causal: predict the response's tokens; classification: the label of a text.",
        rich_help_panel=WHAT,
    ),
]
ClientsOption = Annotated[
    int | None, typer.Option("--clients", "-n", help="How many.", rich_help_panel=WHAT)
]
RanksOption = Annotated[
    str | None,
    typer.Option(
        help="One rank for all, or a list dealt in turn: 64,32,16. Without --clients, one client "
        "for each.",
        rich_help_panel=WHAT,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub id of any causal language model (classification: also an encoder).",
        rich_help_panel=WHAT,
    ),
]
StartFromOption = Annotated[
    str | None,
    typer.Option(
        help="Folder of a PEFT adapter of this model: the run begins from base + adapter.",
        rich_help_panel=WHAT,
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        help="Your .jsonl, .json, .csv or .parquet, with fields 'prompt' and 'response' "
        "(map others by --set data.prompt=...).",
        rich_help_panel=WHAT,
    ),
]
EvalDataOption = Annotated[
    str | None,
    typer.Option(
        "--eval-data",
        metavar="FILE",
        help="Your own test set, in the same fields; then nothing is held out of --data.",
        rich_help_panel=WHAT,
    ),
]
PartitionOption = Annotated[
    str | None, typer.Option(help="iid, dirichlet, natural or files.", rich_help_panel=WHAT)
]
RoundsOption = Annotated[int | None, typer.Option(help="Federated rounds.", rich_help_panel=WHAT)]
FractionOption = Annotated[
    float | None, typer.Option(help="Share of clients sampled each round.", rich_help_panel=WHAT)
]
EpochsOption = Annotated[
    int | None,
    typer.Option(
        help="Passes over a client's examples a round, as far as --steps lets it.",
        rich_help_panel=TRAINING,
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option(
        help="At most this many optimizer steps a round (default 8, for a first look); 0: whole "
        "epochs.",
        rich_help_panel=TRAINING,
    ),
]
LearningRateOption = Annotated[
    float | None,
    typer.Option(
        "--lr",
        help="Peak rate of AdamW; default 6e-3 on the embedded model, 2e-4 on others.",
        rich_help_panel=TRAINING,
    ),
]
SeedOption = Annotated[
    int | None, typer.Option(help="All randomness derives from it.", rich_help_panel=RUN)
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(help="TOML file of keys, such as another run's config.toml.", rich_help_panel=RUN),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key.", rich_help_panel=RUN),
]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=RUN)
]
KEYS = {
    "strategy": "strategy.name",
    "task": "task",
    "clients": "clients.count",
    "ranks": "lora.rank",
    "model": "model.path",
    "start_from": "start.adapter",
    "data": "data.path",
    "eval_data": "data.evaluation",
    "partition": "data.partition",
    "rounds": "rounds",
    "fraction": "clients.fraction",
    "epochs": "local.epochs",
    "steps": "local.max-steps",
    "learning_rate": "local.learning-rate",
    "seed": "seed",
}
"""The parameter of a command -> the key that it sets."""
FLAGS = {"learning_rate": "--lr"}
"""The parameter of a command -> its option, where that has another name."""


def job_layer(parameters: Mapping[str, Any]) -> dict[str, Value]:
    """The keys that these parameters of a command set, `--set` over the others.

    >>> job_layer({"ranks": "8,4", "rounds": None, "set_": ["seed=3"]})
    {'lora.rank': '8,4', 'clients.count': 2, 'seed': 3}
    """
    layer = {
        key: parameters[name] for name, key in KEYS.items() if parameters.get(name) is not None
    }
    if "lora.rank" in layer and "clients.count" not in layer:
        layer |= _as_many_clients_as_ranks(layer["lora.rank"])
    return layer | dict(read_assignment(text) for text in parameters.get("set_") or [])


def as_options(values: Mapping[str, Value]) -> list[str]:
    """These keys as a person gives them to a command; `job_layer` reads them back.

    >>> as_options({"lora.rank": "8,4", "clients.count": 2, "local.batch-size": 4})
    ['--clients', '2', '--ranks', '8,4', '--set', 'local.batch-size=4']
    """
    options: list[str] = []
    for name, key in KEYS.items():
        if key in values:
            options += [FLAGS.get(name, f"--{name.replace('_', '-')}"), str(values[key])]
    for key, value in values.items():
        if key not in KEYS.values():
            options += ["--set", as_assignment(key, value)]
    return options


def _as_many_clients_as_ranks(ranks: str) -> dict[str, Value]:
    """One rank says nothing about how many; a list that cannot be read is refused later."""
    try:
        listed = parse_ranks(ranks)
    except ValueError:
        return {}
    return {"clients.count": len(listed)} if len(listed) > 1 else {}


def config_layers(config: Path | None, lists: bool = True) -> list[dict[str, Value]]:
    """The keys of a --config file, apart from where its run was written.

    lists: False where `flwr run` must take the file as well.
    """
    from journal.run_folder import read_config

    return [] if config is None else [{**read_config(config, lists), "output": "", "resume": False}]
