r"""data.template: text with the names of fields in braces, or the name of a preset.

    ### Question\n{question}\n### Answer\n      {question} stands for the field of that name,
                                               {prompt} for the field that data.prompt names,
                                               {{ and }} for a brace

A preset may leave a section out where its field is empty.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PROMPT = "prompt"
"""The name that stands for the field of data.prompt."""
TOKEN = re.compile(r"\{\{|\}\}|\{(?P<name>[^\W\d](?:[\w -]*\w)?)\}|[{}]")
"""A brace written twice, a field, or a lone brace, which is a mistake."""
QUOTED = 40
"""Characters around a lone brace that a message shows."""


@dataclass(frozen=True)
class Field:
    """A place in a template that a field of the data fills."""

    name: str


Part = str | Field


@dataclass(frozen=True)
class Preset:
    """A format that many data sets share."""

    choose: Callable[[Mapping[str, str]], str]
    """The template for one example's fields."""
    fields: tuple[str, ...]
    response: str
    """Name of the field that holds the response in files of this format."""
    optional: tuple[str, ...] = ()
    """Fields that a file of this format may lack: they are then empty."""


def _alpaca(fields: Mapping[str, str]) -> str:
    given = bool(fields["input"].strip())
    return (
        "Below is an instruction that describes a task"
        + (", paired with an input that provides further context" if given else "")
        + ". Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n"
        + ("### Input:\n{input}\n\n" if given else "")
        + "### Response:\n"
    )


PRESETS = {"alpaca": Preset(_alpaca, ("instruction", "input"), "output", ("input",))}
"""The instruction format of Alpaca (Taori et al., 2023)."""


def template_fields(template: str) -> tuple[str, ...]:
    r"""Names of the fields that a template or preset takes, each once, in their order.

    Raises ValueError for a brace that neither names a field nor is written twice, and for a
    template without a field.

    >>> template_fields("Q: {question} {{sic}} {prompt}\\n"), template_fields("alpaca")
    (('question', 'prompt'), ('instruction', 'input'))
    """
    if template in PRESETS:
        return PRESETS[template].fields
    names = [part.name for part in template_parts(template) if isinstance(part, Field)]
    if not names:
        raise ValueError(
            f"expected auto, a preset ({', '.join(PRESETS)}), or text that names a field in braces "
            "such as {prompt}"
        )
    return tuple(dict.fromkeys(names))


def optional_fields(template: str) -> frozenset[str]:
    """Fields of a preset that a file may lack.

    >>> sorted(optional_fields("alpaca")), sorted(optional_fields("{input}"))
    (['input'], [])
    """
    return frozenset(PRESETS[template].optional) if template in PRESETS else frozenset()


def template_parts(template: str) -> list[Part]:
    """Text and fields in turn, beginning and ending with text, which may be empty.

    >>> template_parts("Q: {prompt}")
    ['Q: ', Field(name='prompt'), '']
    """
    parts: list[Part] = []
    text, at = "", 0
    for match in TOKEN.finditer(template):
        text += template[at : match.start()]
        at = match.end()
        if match["name"]:
            parts += [text, Field(match["name"])]
            text = ""
        elif len(match[0]) == 2:
            text += match[0][0]
        else:
            around = template[max(0, match.start() - QUOTED // 2) : match.end() + QUOTED // 2]
            raise ValueError(
                f"a brace that names no field, in {around!r}: write {{{{ and }}}} for a brace in "
                "the text, and {name} with nothing but the name of a field for its value"
            )
    return [*parts, text + template[at:]]


def parts_for(template: str, fields: Mapping[str, str]) -> list[Part]:
    """The parts of a template, or of a preset's template for these fields."""
    preset = PRESETS.get(template)
    return template_parts(preset.choose(fields) if preset else template)


def check_template(template: str) -> None:
    """ValueError where this is no template; `auto` is left to the data."""
    if template != "auto":
        template_fields(template)
