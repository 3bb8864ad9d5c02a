"""`bouquet options`: every key of the configuration, section by section, or those that match."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, get_type_hints

import typer
from rich.markup import escape

from commands import job_options as job
from commands.terminal import console
from core.errors import UsageError
from settings.keys import KINDS, Rule, nearest_key, shown_value, walk
from settings.run import RunSettings, default_values
from strategies.registry import knob_values, knobs_in, strategy_names

WIDEST = 100
"""Longer lines are hard to read, however wide the terminal is."""
INDENT = " " * 6
Key = tuple[str, type, Rule]


def options(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[WORD]...",
            help="Only keys in whose name or meaning these words stand, or begin a word.",
        ),
    ] = None,
    debug: job.DebugOption = False,
) -> None:
    """List the configuration keys: each with its default, its range and what it means.

    Examples:
      bouquet options

      bouquet options lora

      bouquet options held out
    """
    defaults = default_values()
    for strategy in strategy_names():
        values = knob_values(strategy)
        defaults |= {f"strategy.{strategy}.{knob}": values[knob] for knob in values}
    width = min(console.width, WIDEST)
    for title, about, keys in matching(words or []):
        heading = f"[bold]{title}[/]" + (f"  [dim]{escape(about)}[/]" if about else "")
        console.print(heading, soft_wrap=True)
        for name, kind, rule in keys:
            value = escape(shown_value(defaults[name]))
            console.print(f"  [cyan]{name}[/] = {value}", soft_wrap=True)
            for line in _indented(rule.doc, width):
                console.print(line, soft_wrap=True, markup=False)
            for line in _indented(allowed(kind, rule), width):
                console.print(line, soft_wrap=True, markup=False, style="dim")
        console.print()
    console.print("Set a key by [cyan]--set key=value[/], by [cyan]--config FILE.toml[/],")
    console.print("or by [cyan]flwr run . --run-config 'key=value'[/].")


def _indented(text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=INDENT,
        subsequent_indent=INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def sections() -> Iterator[tuple[str, str, list[Key]]]:
    """(name, what it is about, its keys) for each section; the run's own keys come first."""
    hints = get_type_hints(RunSettings)
    keys = list(walk(RunSettings))
    yield "the run", "", [key for key in keys if "." not in key[0]]
    for entry in fields(RunSettings):
        if is_dataclass(hints[entry.name]):
            about = str(hints[entry.name].__doc__).strip().splitlines()[0]
            own = [key for key in keys if key[0].startswith(f"{entry.name}.")]
            yield entry.name, about, [*own, *(_knobs() if entry.name == "strategy" else [])]


def _knobs() -> list[Key]:
    """Those of every method, by the keys that set them."""
    return [
        (f"strategy.{name}.{knob}", kind, rule)
        for name in strategy_names()
        for knob, kind, rule in knobs_in(name)
    ]


def matching(words: Sequence[str]) -> list[tuple[str, str, list[Key]]]:
    """The sections, with those of their keys that all words match, or, if none does, any word.

    A word matches where it begins a word of the key or of its meaning; without words, all keys
    match. Raises UsageError with the nearest key where no word matches anywhere.
    """
    spelled = [word.strip().lower().replace("_", "-") for word in words]

    def matches(key: Key) -> list[bool]:
        text = f"{key[0]} {key[2].doc}".lower()
        return [bool(re.search(rf"(?<![a-z0-9]){re.escape(word)}", text)) for word in spelled]

    for enough in (all, any):
        found = [
            (title, about, own)
            for title, about, keys in sections()
            if (own := [key for key in keys if enough(matches(key))])
        ]
        if found:
            return found
    near = nearest_key("-".join(spelled), [key[0] for key in walk(RunSettings)])
    hint = f"; the nearest key is {near}" if near else ""
    raise UsageError(
        f"no key has {' or '.join(map(repr, words))} in its name or meaning{hint}. "
        "`bouquet options` lists all keys."
    )


def allowed(kind: type, rule: Rule) -> str:
    """Which values a key takes; empty for text of any kind.

    >>> allowed(int, Rule("", at_least=1)), allowed(str, Rule("", one_of=("A", "B")))
    ('a whole number, at least 1', 'one of A, B')
    """
    if kind is str:
        return rule.range()
    return f"{KINDS[kind]}, {rule.range()}" if rule.range() else KINDS[kind]
