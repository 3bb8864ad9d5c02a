"""Every key of a run: what it means, its unit and its range. Defaults stand in pyproject.toml."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from core.errors import UsageError
from settings.federation import (
    ClientsSettings,
    EvaluateSettings,
    StartSettings,
    StatusSettings,
    StrategySettings,
    WireSettings,
)
from settings.keys import Value, coerce, flatten_tables, key, listed, parse
from settings.knobs import fold_knobs
from settings.labels import canonical_label
from settings.paths import absolute_path, absolute_paths
from settings.templates import PRESETS, check_template, template_fields

EMBEDDED = "embedded"
MAY_CHANGE_ON_RESUME = (
    "rounds",
    "output",
    "resume",
    "clients.timeout-seconds",
    "clients.min-replies",
    "status.prometheus",
    "status.notify",
    "model.device",
    "model.path",
    "data.path",
    "data.evaluation",
    "data.chat-template-file",
)
"""A run that goes on keeps every other key. Model and data may have moved: that they are the same
is known by what they hold."""
AUTO = "auto"
LEARNING_RATES = {True: 6e-3, False: 2e-4}
"""On the embedded model of 3.8 M parameters, and on any other, most likely a far larger one."""
EMBEDDED_TEMPLATE = '{prompt}\n"""\n'
EMBEDDED_ENDING = '\n"""'


def parse_ranks(text: str) -> tuple[int, ...]:
    """'64,32,16' as whole numbers of at least 1.

    >>> parse_ranks("5, 3,7")
    (5, 3, 7)
    """
    try:
        ranks = tuple(int(part) for part in text.split(","))
    except ValueError:
        ranks = ()
    if not ranks or min(ranks) < 1:
        raise ValueError("expected whole numbers of at least 1, separated by commas")
    return ranks


def parse_alpha(text: str) -> tuple[float, bool]:
    """'16' as (16.0, False): the same alpha at every rank; '2r' as (2.0, True): twice the rank.

    >>> parse_alpha("2r"), parse_alpha("16")
    ((2.0, True), (16.0, False))
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(r?)\s*", text)
    if match is None or float(match[1]) <= 0.0:
        raise ValueError("expected a number above 0, or a multiple of the rank such as 2r")
    return float(match[1]), bool(match[2])


def _parse_share(text: str) -> None:
    if text != AUTO:
        try:
            fits = 0.0 <= float(text) <= 0.5
        except ValueError:
            fits = False
        if not fits:
            raise ValueError("expected auto, or a share from 0 to 0.5")


def _share(text: str, auto: float) -> float:
    return auto if text == AUTO else float(text)


@dataclass(frozen=True)
class ModelSettings:
    """The common base model."""

    path: str = key(
        "A folder or hub id of a causal language model, or under task=classification of an encoder "
        "or classifier; 'embedded' is the small causal one shipped here."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = key("Number format of the frozen base.")
    device: str = key("Where to train: auto takes CUDA where there is one. A site may override.")
    quantization: Literal["none", "int8", "nf4"] = key(
        "Hold the frozen base in 8 or 4 bits (bitsandbytes: pip install 'bouquet[quantization]'); "
        "none: as model.dtype says.",
    )
    trust_remote_code: bool = key(
        "Run the Python code that some models bring along. It can do anything: read it first."
    )


@dataclass(frozen=True)
class DataSettings:
    """What the clients train on, and how it is dealt to them in a simulation."""

    path: str = key(
        "A .jsonl, .json, .csv or .parquet file, a folder of them, or several of either, with "
        "commas or as a TOML list, which flwr run takes in quotes alone: "
        """'["a, b.jsonl", "c.jsonl"]'; 'embedded' reads the docstrings of Python's standard """
        "library."
    )
    partition: Literal["auto", "iid", "dirichlet", "natural", "files"] = key(
        "How examples are dealt to clients: at random; by Dirichlet shares of each label in "
        "data.field; whole groups of equal data.field; or one file for each client. auto is "
        "natural for the embedded data and iid for other.",
    )
    field: str = key(
        "The field that dirichlet and natural partitions go by. auto: package for the embedded "
        "data, none for other."
    )
    min_examples: int = key(
        "dirichlet: shares are drawn again until every client has this many examples.", at_least=1
    )
    dirichlet_alpha: float = key(
        "Concentration of the Dirichlet partition: 0.1 is very uneven, 100 nearly IID.", above=0
    )
    prompt: str = key("Field that holds the prompt; the template puts it into context.")
    response: str = key(
        "Field that holds the response. auto: response, or what data.template's preset calls it."
    )
    text: str = key(
        "Field that holds running text, instead of prompt and response; may be empty. The text to "
        "classify, where it is not data.prompt."
    )
    label: str = key("task=classification: field that holds the label.")
    labels: str = key(
        "task=classification: all labels in the order of the classes, with commas or as a TOML "
        """list, which flwr run takes in quotes alone: '["yes, but", "no"]'; 0 and 0.0 are one """
        "label. Empty: those in the data, sorted."
    )
    template: str = key(
        "Text before the response, with fields in braces: {prompt} is that of data.prompt, any "
        "other name a field of the data, {{ a brace. Or the preset alpaca (fields instruction, "
        "input and output). auto fits the embedded data, and is the prompt and a line break for "
        "other.",
        check=check_template,
    )
    ending: str = key("Text after the response, before the end-of-text token; or auto.")
    chat_template: bool = key(
        "Use the tokenizer's own chat template instead of data.template, whose fields are then the "
        "user's turn; conversations always do."
    )
    chat_template_file: str = key(
        "File with a chat template (Jinja), in place of the tokenizer's own, and in use as if "
        "data.chat-template were set; empty: its own."
    )
    loss_on: Literal["response", "all"] = key("Tokens that count in the loss.")
    context: int = key(
        "Most tokens of one example; longer responses and conversations lose their end.", at_least=8
    )
    max_prompt: int = key(
        "Most tokens of a prompt, or of all fields of data.template together; of longer ones the "
        "beginning is kept. 0: half of the context. Conversations have no such limit.",
        at_least=0,
    )
    max_examples: int = key("Use only this many examples, chosen by seed; 0: all.", at_least=0)
    evaluation: str = key(
        "File (or several, as in data.path) with a test set of its own for the global model; "
        "empty: a share of data.path is held out."
    )
    held_out: str = key(
        "Share of all examples held out for the global model, from 0 to 0.5; no client trains on "
        "them. auto: 0.05, or nothing where data.evaluation names a test set.",
        check=_parse_share,
    )
    client_held_out: str = key(
        "Share of a client's examples that it holds out for evaluation, from 0 to 0.5. auto: 0.1, "
        "or nothing where data.evaluation or the site's evaluation-path names a test set.",
        check=_parse_share,
    )

    def held_out_share(self) -> float:
        """The share of all examples that is held out for the global model."""
        return _share(self.held_out, 0.0 if self.evaluation else 0.05)

    def client_held_out_share(self, own_evaluation: bool = False) -> float:
        """The share of a client's examples that it holds out.

        own_evaluation: it brings a test set of its own.
        """
        return _share(self.client_held_out, 0.0 if self.evaluation or own_evaluation else 0.1)

    def listed_labels(self) -> tuple[str, ...]:
        """The labels one by one, as `canonical_label` writes them; () where the data tell them.

        Raises UsageError for fewer than two, an empty one, or one that comes twice.
        """
        labels = tuple(canonical_label(label) for label in listed(self.labels))
        if not labels:
            return ()
        if len(labels) < 2 or "" in labels or len(set(labels)) < len(labels):
            raise UsageError(
                f"data.labels={self.labels!r}: expected at least two labels, none empty and each "
                "once, with commas or as a TOML list"
            )
        return labels


@dataclass(frozen=True)
class LoraSettings:
    """The shape of the adapters."""

    rank: str = key(
        "One rank for every client, or several, dealt to the clients in turn. A site may override.",
        check=parse_ranks,
    )
    alpha: str = key(
        "Numerator of the scale alpha / r: a number, or a multiple of the rank such as 2r.",
        check=parse_alpha,
    )
    rslora: bool = key("Scale by alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732).")
    target_modules: str = key(
        "Names of the linear layers to adapt, with commas (q_proj,v_proj), or all-linear."
    )
    target_parameters: str = key(
        "Names of weights that are no linear layers to adapt as well, with commas: the experts of "
        "a mixture (mlp.experts.gate_up_proj,mlp.experts.down_proj); empty: none."
    )
    dropout: float = key("Dropout on the input of A while training.", at_least=0, at_most=0.9)

    def rank_of(self, client: int) -> int:
        """The rank of the client with this number, counted from 0."""
        ranks = parse_ranks(self.rank)
        return ranks[client % len(ranks)]

    def scale_of(self, rank: int) -> float:
        """S = alpha / r, or alpha / sqrt(r) under rsLoRA."""
        alpha, per_rank = parse_alpha(self.alpha)
        return (alpha * rank if per_rank else alpha) / (rank**0.5 if self.rslora else rank)


@dataclass(frozen=True)
class LocalSettings:
    """How a client trains in one round."""

    epochs: int = key("Passes over the client's examples.", at_least=1)
    max_steps: int = key(
        "Most optimizer steps a round, so that a first look is quick; 0: whole epochs.", at_least=0
    )
    batch_size: int = key("Examples in one forward pass.", at_least=1)
    accumulation: int = key("Forward passes for one optimizer step.", at_least=1)
    learning_rate: float = key(
        "Peak learning rate of AdamW; 0: 6e-3 on the embedded model, 2e-4 on any other.", at_least=0
    )
    schedule: Literal["cosine", "linear", "constant"] = key(
        "Learning rate over the round's steps, after warm-up.",
    )
    warmup: float = key("Share of the steps over which the rate rises.", at_least=0, at_most=1)
    weight_decay: float = key("Decoupled weight decay on the factors.", at_least=0)
    max_grad_norm: float = key("Gradients are clipped to this norm; 0: never.", at_least=0)
    checkpointing: bool = key(
        "Compute activations again in the backward pass instead of keeping them: less memory, "
        "about a third more time."
    )
    precision: Literal["auto", "float32", "bfloat16"] = key(
        "Arithmetic of training: bfloat16 autocast, or float32, which is the base's own format "
        "beside factors in float32. auto is bfloat16 where GPU or CPU have it in hardware and "
        "model.dtype is not float16. Evaluation is always in the base's own format.",
    )


@dataclass(frozen=True)
class RunSettings:
    """One run, whole."""

    strategy: StrategySettings
    clients: ClientsSettings
    model: ModelSettings
    data: DataSettings
    lora: LoraSettings
    local: LocalSettings
    evaluate: EvaluateSettings
    wire: WireSettings
    status: StatusSettings
    start: StartSettings
    task: Literal["causal", "classification"] = key(
        "causal: the loss is that of the response's tokens; classification: of a text's label.",
    )
    rounds: int = key("Federated rounds.", at_least=1)
    seed: int = key("Every random choice of the run derives from it.", at_least=0, at_most=2**31)
    output: str = key("Folder of the run; empty: runs/STRATEGY-NUMBER.")
    resume: bool = key(
        "Go on with the run in the output folder, or begin it where there is none: the same "
        "command starts a run and takes it up again."
    )

    def evaluation_tokens(self) -> int:
        """Most tokens of one forward pass of evaluation, padding included."""
        return self.evaluate.batch_tokens or self.local.batch_size * self.data.context

    def ranks(self) -> list[int]:
        """The rank of each simulated client, in order."""
        return [self.lora.rank_of(client) for client in range(self.clients.count)]


def default_values() -> dict[str, Value]:
    """The defaults, from [tool.flwr.app.config] of the project's pyproject.toml."""
    path = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if path.is_file():
        tables = tomllib.loads(path.read_text())
        config = tables.get("tool", {}).get("flwr", {}).get("app", {}).get("config")
        if config is not None:
            return flatten_tables(config)
    raise UsageError(f"{path} with [tool.flwr.app.config] is not there: reinstall")


def run_settings(*layers: Mapping[str, Value]) -> RunSettings:
    """The defaults with each layer over the one before it, checked.

    Decided are the `auto` of data (but not the shares to hold out) and the learning rate.

    Paths are absolute then: the run resumes and its adapter loads from any folder.
    """
    values = default_values()
    for layer in layers:
        values = fold_knobs(values | coerce(layer, RunSettings))
    settings = parse(RunSettings, values)
    if settings.model.dtype == "float16" and settings.local.precision == "bfloat16":
        raise UsageError(
            "local.precision=bfloat16 does not go with model.dtype=float16, whose weights it would "
            "round: take model.dtype=bfloat16, or leave local.precision=auto"
        )
    rate = settings.local.learning_rate or LEARNING_RATES[settings.model.path == EMBEDDED]
    return replace(
        settings,
        data=_decided(settings.data),
        model=replace(settings.model, path=_absolute_model(settings.model.path)),
        start=replace(settings.start, adapter=absolute_path(settings.start.adapter)),
        status=replace(settings.status, prometheus=absolute_path(settings.status.prometheus)),
        local=replace(settings.local, learning_rate=rate),
    )


def _absolute_model(path: str) -> str:
    """A folder by its absolute path; the embedded model and a hub id as they are."""
    is_folder = path.startswith((".", "~", "/")) or (path != "" and Path(path).is_dir())
    return absolute_path(path) if is_folder and path != EMBEDDED else path


def _decided(data: DataSettings) -> DataSettings:
    embedded = data.path == EMBEDDED
    preset = PRESETS.get(data.template)
    data = replace(
        data,
        path=data.path if embedded else absolute_paths(data.path),
        evaluation=absolute_paths(data.evaluation),
        chat_template_file=absolute_path(data.chat_template_file),
    )
    choices: dict[str, Any] = {
        "response": preset.response if preset else "response",
        "partition": "natural" if embedded else "iid",
        "field": "package" if embedded else "",
        "template": EMBEDDED_TEMPLATE if embedded else "{prompt}\n",
        "ending": EMBEDDED_ENDING if embedded else "",
    }
    undecided = {name: value for name, value in choices.items() if getattr(data, name) == AUTO}
    decided = replace(data, max_prompt=data.max_prompt or data.context // 2, **undecided)
    if decided.response in template_fields(decided.template):
        raise UsageError(
            f"data.template names {{{decided.response}}}, which is the response (data.response): "
            "that follows the template by itself, so leave it out there"
        )
    return decided
