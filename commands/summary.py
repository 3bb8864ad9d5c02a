"""The end of a simulation: base, federated and central side by side, and what to do next."""

import json
import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from commands.display import shown
from commands.job_options import as_options
from core.units import human_bytes
from journal.record import RoundRecord, value_of
from settings.keys import as_list, flatten
from settings.paths import named_paths
from settings.run import EMBEDDED, RunSettings, parse_ranks, run_settings

DECIDE_DEFAULTS = ("task", "model.path", "data.path", "data.evaluation", "data.context")
"""What the defaults of other keys depend on."""
PRINTED = 76
"""The longest printed line of Python: behind four spaces it just fits into 80 columns."""
OF_ONE_RUN = ("strategy.name", "start.policy", "output", "resume")
"""What a comparison sets for each of its runs, or what another strategy would refuse."""


def comparison(
    settings: RunSettings, rounds: Sequence[RoundRecord], central: Mapping[str, Any] | None
) -> Table:
    """Each model's held-out loss, what it means, and how many examples it was trained on.

    What it means is the perplexity, or the accuracy where the task is to classify. Where there is
    no global model to evaluate, all are losses on the clients' own held-out parts.
    """
    own = "held_out_loss" not in rounds[-1]
    prefix = "client_held_out" if own else "held_out"
    classifies = settings.task == "classification"
    meaning = "accuracy" if classifies else "perplexity"
    table = Table(box=None, padding=0, header_style="bold")
    table.add_column("model", no_wrap=True, width=31)
    heading = "clients' loss" if own else "held-out loss"
    for name, width in ((heading, 13), ("change", 10), (meaning, 12), ("seen", 12)):
        table.add_column(name, justify="right", width=width, no_wrap=True)
    seen = sum(_seen(client, settings) for record in rounds[1:] for client in record["clients"])
    rows: list[tuple[str, Mapping[str, Any], int]] = [
        ("base + adapter" if settings.start.adapter else "base, as shipped", rounds[0], 0),
        (f"federated, {settings.strategy.name}", rounds[-1], seen),
    ]
    if central is not None:
        rows.append(
            (f"central, rank {central['rank']}, pooled data", central, _seen(central, settings))
        )
    base = value_of(rounds[0], f"{prefix}_loss")
    for name, record, seen in rows:
        loss = record.get(f"{prefix}_loss")
        if loss is not None:
            change = f"{loss - base:+.4f}" if base is not None and loss != base else ""
            accuracy = _own_accuracy(record) if own else record.get("held_out_accuracy")
            means = shown(accuracy, "{:.3f}") if classifies else f"{math.exp(min(loss, 700)):,.1f}"
            table.add_row(name, f"{loss:.4f}", change, means, f"{seen:,}")
    return table


def _seen(record: Mapping[str, Any], settings: RunSettings) -> int:
    """Examples that were trained on; of an older record, which lacks the count, at most so many."""
    if "examples_seen" in record:
        return int(record["examples_seen"])
    whole = int(record["steps"]) * settings.local.batch_size * settings.local.accumulation
    given = record.get("num_examples")  # central's older records do not say
    return whole if given is None else min(whole, settings.local.epochs * int(given))


def _own_accuracy(record: Mapping[str, Any]) -> float | None:
    """The mean over clients, each counting once; None where none said."""
    heard = [client["accuracy"] for client in record["client_held_out"] if "accuracy" in client]
    return statistics.fmean(heard) if heard else None


def print_summary(
    console: Console,
    settings: RunSettings,
    folder: Path,
    rounds: Sequence[RoundRecord],
    central: Mapping[str, Any] | None,
) -> None:
    """The table, the totals and the next useful commands."""
    console.print()
    console.print(comparison(settings, rounds, central))
    up = sum(record["bytes_up"] for record in rounds[1:])
    down = sum(record["bytes_down"] for record in rounds[1:])
    failures = sum(len(record["failures"]) for record in rounds[1:])
    console.print(
        f"\n[dim]all rounds: {human_bytes(up)} up, {human_bytes(down)} down"
        + (f"; {failures} replies excluded, see rounds.jsonl" if failures else "")
        + "[/]"
    )
    console.print("\n[bold]Next[/]")
    for meaning, lines in next_steps(settings, folder):
        console.print(f"  [dim]{meaning}[/]")
        for line in lines:
            console.print(f"    [cyan]{escape(line)}[/]", soft_wrap=True)


def next_steps(settings: RunSettings, folder: Path) -> list[tuple[str, list[str]]]:
    """What a person may do with the run in this folder: in words, and as lines to paste."""
    place = shown_path(folder)
    other = "zero-padding" if settings.strategy.name != "zero-padding" else "flora-warm"
    compared = f"{settings.strategy.name},{other}"
    longer = ["--resume", place, "--rounds", str(settings.rounds + 2)]
    steps = [
        ("every number of every round", [shlex.join(["less", f"{place}/rounds.jsonl"])]),
        ("two rounds more", [shlex.join(["bouquet", "simulate", *longer])]),
        (
            "the same job under several strategies, side by side",
            [shlex.join(["bouquet", "compare", "-s", compared, *job_of(settings)])],
        ),
    ]
    if (folder / "adapter").is_dir():
        own = "; no head is in it, as each client kept its own"
        meaning = "use the adapter in Python" + own * (settings.clients.head == "own")
        steps.append((meaning, python_lines(settings, folder)))
    return steps


def job_of(settings: RunSettings) -> list[str]:
    """The options with which `bouquet compare` does the job of these settings.

    All that differs from what the same model and data get by default, but what a strategy alone
    decides.
    """
    values = flatten(settings)
    defaults = flatten(run_settings({key: values[key] for key in DECIDE_DEFAULTS}))
    given = flatten(run_settings())
    carried = {
        key: SHOWN[key](str(value)) if key in SHOWN else value
        for key, value in values.items()
        if key not in OF_ONE_RUN
        and value != (given if key in DECIDE_DEFAULTS else defaults).get(key)
    }
    ranks = parse_ranks(settings.lora.rank)
    if "lora.rank" in carried and len(ranks) > 1:  # a list of ranks says how many clients
        carried["clients.count"] = settings.clients.count
        if len(ranks) == settings.clients.count:
            del carried["clients.count"]
    return as_options(carried)


def python_lines(settings: RunSettings, folder: Path) -> list[str]:
    """Python that loads the run's global model, as the run itself had it."""
    from models.base_model import embedded_model_path
    from tasks.examples import CLASSIFICATION
    from tasks.labels import label_names

    own = settings.model.path != EMBEDDED
    base = json.dumps(shown_path(settings.model.path if own else embedded_model_path()))
    adapter = json.dumps(f"{shown_path(folder)}/adapter")
    classifies = settings.task == CLASSIFICATION
    auto = f"AutoModelFor{'SequenceClassification' if classifies else 'CausalLM'}"
    options = [f'dtype="{settings.model.dtype}"']
    if settings.model.trust_remote_code:
        options.append("trust_remote_code=True")
    packed = settings.model.quantization != "none"
    names = [auto, *(["AutoTokenizer"] if classifies else [])]
    if packed:
        names.append("BitsAndBytesConfig")
        options.append("quantization_config=packed")
    lines = [
        *(["import torch"] if settings.model.quantization == "nf4" else []),
        "from peft import PeftModel",
        *_imports("transformers", sorted(names)),
    ]
    if packed:
        lines += _packed(settings)
    if classifies:  # a decoder judges the last token that is none of padding
        lines += [
            *_call("tokenizer = AutoTokenizer.from_pretrained", [base]),
            "tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token",
        ]
        options += ["pad_token_id=tokenizer.pad_token_id", "ignore_mismatched_sizes=True"]
        if (folder / "adapter" / "labels.json").is_file():
            lines[:0] = ["import json", "from pathlib import Path"]
            lines += [
                f'classes = Path({adapter}, "labels.json").read_text("utf-8")',
                'labels = json.loads(classes)["label2id"]',
                "names = {number: label for label, number in labels.items()}",
            ]
            options += ["id2label=names", "label2id=labels"]
        else:
            options.append(f"num_labels={len(label_names(settings.data, settings.task))}")
        lines.append("# newly initialized weights are expected here: the adapter brings the head")
    return [
        *lines,
        *_call(f"base = {auto}.from_pretrained", [base, *options]),
        *_call("model = PeftModel.from_pretrained", ["base", adapter]),
    ]


def shown_paths(text: str) -> str:
    """A text that names the same files and folders, each as `shown_path` has it."""
    return as_list([shown_path(path) for path in named_paths(text)])


def _imports(module: str, names: Sequence[str]) -> list[str]:
    """One line, or one for each name where that would be too long."""
    line = f"from {module} import {', '.join(names)}"
    return [line] if len(line) <= PRINTED else [f"from {module} import {name}" for name in names]


def _call(begin: str, arguments: Sequence[str]) -> list[str]:
    """A call in one line, or with a line for each argument where that would be too long.

    >>> _call("f", ["1", "x=2"]), _call("f", ["'a'", "x" * PRINTED])[:2]
    (['f(1, x=2)'], ['f(', "    'a',"])
    """
    line = f"{begin}({', '.join(arguments)})"
    if len(line) <= PRINTED:
        return [line]
    return [f"{begin}(", *(f"    {argument}," for argument in arguments), ")"]


def _left_whole(settings: RunSettings) -> list[str]:
    """The modules of a classifier that quantization leaves as they are, in the run as here."""
    from transformers import AutoConfig

    from models.base_model import embedded_model_path
    from models.model_files import find_model
    from models.quantization import unpacked_modules

    own = settings.model.path != EMBEDDED
    place = find_model(settings.model.path if own else str(embedded_model_path()))
    config = AutoConfig.from_pretrained(
        place.name,
        trust_remote_code=settings.model.trust_remote_code,
        local_files_only=place.local_only,
    )
    return unpacked_modules(config)


def _packed(settings: RunSettings) -> list[str]:
    """How the run held the base's weights, as a configuration of transformers named `packed`."""
    from tasks.examples import CLASSIFICATION

    nf4 = settings.model.quantization == "nf4"
    arguments = ["load_in_8bit=True"]
    if nf4:
        dtype = f"bnb_4bit_compute_dtype=torch.{settings.model.dtype}"
        arguments = ["load_in_4bit=True", 'bnb_4bit_quant_type="nf4"', dtype]
    if settings.task == CLASSIFICATION:
        arguments.append(f"llm_int8_skip_modules={json.dumps(_left_whole(settings))}")
    return _call("packed = BitsAndBytesConfig", arguments)


def shown_path(path: object) -> str:
    """A path as a person in this folder would write it: what lies below begins here.

    What is no absolute path stays as it is, such as a hub id.
    """
    text = str(path)
    if Path(text).is_absolute() and Path(text).is_relative_to(Path.cwd()):
        return str(Path(text).relative_to(Path.cwd()))
    return text


SHOWN: dict[str, Callable[[str], str]] = {
    "model.path": shown_path,
    "start.adapter": shown_path,
    "data.chat-template-file": shown_path,
    "data.path": shown_paths,
    "data.evaluation": shown_paths,
}
"""Keys that name files and folders, one or several, and how they are shown."""
