r"""Conversations through a chat template: their text, and which characters of it count in the loss.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
                                                       `-- in the loss --'

A turn of the assistant counts from where the template's generation prompt ends, for there the model
begins to write, to the token that ends the turn, for there it stops. What the template writes after
that token does not count, nor does anything that others say.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from core.errors import UsageError, listing, quoted
from settings.run import DataSettings
from tasks.conversations import ASSISTANT, Turn
from tasks.token_ids import SpecialTokens

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template marks what the assistant writes, where it does."""
DATE = {"%d": "26", "%-d": "26", "%B": "July", "%b": "Jul", "%m": "07", "%Y": "2024", "%y": "24"}
"""The day that a template prints which asks for today's: Llama's own default, the same each day."""
PRIVATE = range(0xE000, 0xF8FF)
"""Characters that mean nothing by themselves and stand for something while a template renders."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[Span, ...]
    """From where to where the characters count, in order."""
    cuts: tuple[int, ...]
    """Where the text must be split, so that nothing that a turn says is a special token."""
    rewritten: bool
    """The template changed or left out what a turn says."""
    endless: bool
    """A turn of the assistant ends without a token that ends it."""


class ChatTemplate:
    """A Jinja template for conversations, with the tokenizer whose special tokens it writes.

    Raises UsageError where the tokenizer has none and data.chat-template-file names none, or where
    the tokenizer does not know where its tokens lie in a text.
    """

    def __init__(self, tokenizer: Any, data: DataSettings) -> None:
        if not tokenizer.is_fast:
            raise UsageError(
                "conversations and chat templates need a tokenizer that knows where its tokens lie "
                "in the text (a tokenizer.json), which this model does not have"
            )
        self._special = SpecialTokens(tokenizer)
        self._names = dict(tokenizer.special_tokens_map)
        self._source, self.origin = _find(tokenizer, data)
        self._marked = bool(GENERATION.search(self._source))
        self._prompts = "add_generation_prompt" in self._source
        if "strftime_now" in self._source:
            self._source = _fixed_date() + self._source
        self._ends: dict[str, bool] = {}

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """The conversation as the template renders it.

        Raises UsageError where the template refuses it, is no Jinja, or hides what the assistant
        says.
        """
        everything = "".join(turn.content for turn in turns)
        mark, stand_in = _unused(everything)
        marked = [replace(t, content=self._broken(t.content, mark)) for t in turns]
        text, spans = self._text_and_marks(marked)
        if not self._marked:
            spans = [
                span
                for at, turn in enumerate(marked)
                if turn.role == ASSISTANT and turn.content.strip()
                if (span := self._span(text, marked, at, stand_in))
            ]
        closed = [(start, self._close(text, end, marked, stand_in)) for start, end in spans]
        places = [match.start() for match in re.finditer(mark, text)]
        return Rendered(
            text.replace(mark, ""),
            tuple((_without(places, start), _without(places, end)) for start, end in closed),
            tuple(place - before for before, place in enumerate(places)),
            rewritten=any(turn.content.strip() not in text for turn in marked),
            endless=any(not self._special.end(text[start:end].rstrip()) for start, end in closed),
        )

    def _broken(self, content: str, mark: str) -> str:
        """The content with a mark inside each special token that it spells."""
        cuts = self._special.cuts(content)
        bounds = zip([0, *cuts], [*cuts, len(content)], strict=True)
        return mark.join(content[a:b] for a, b in bounds)

    def _span(
        self, text: str, turns: Sequence[Turn], at: int, stand_in: str
    ) -> tuple[int, int] | None:
        """What one turn of the assistant writes; None where the template leaves the turn out.

        Another text in its place shows where it ends, and where it begins if the template has no
        generation prompt, or renders the turns before otherwise when more come after.
        """
        other = self._text([*turns[:at], replace(turns[at], content=stand_in), *turns[at + 1 :]])
        if stand_in not in other:
            return None
        before, _, after = other.partition(stand_in)
        start = self._prompt_length(text, turns[:at])
        if start is None and text.startswith(before):
            start = len(before) - before.endswith(" ")  # a space before a word is the word's
        end = len(text) - len(after)
        if start is None or stand_in in after or not text.endswith(after) or start > end:
            raise UsageError(
                f"{self.origin} changes more than the place of a turn, so that the tokens of the "
                f"assistant cannot be told in a conversation that begins {_beginning(turns)}: mark "
                "what it writes with {% generation %} in a template that data.chat-template-file "
                "names"
            )
        return start, end

    def _prompt_length(self, text: str, before: Sequence[Turn]) -> int | None:
        """Length of what the model would be asked to go on from, where the text begins with it."""
        if not before or not self._prompts:
            return None
        try:
            prompt, without = self._text(before, generate=True), self._text(before)
        except UsageError:  # a template may not take a conversation that stops here
            return None
        return len(prompt) if text.startswith(prompt) and prompt != without else None

    def _close(self, text: str, end: int, turns: Sequence[Turn], stand_in: str) -> int:
        """The end of the token that ends the turn, where one comes next."""
        at = end + len(text[end:]) - len(text[end:].lstrip())
        token = self._special.at(text, at)
        closes = bool(token) and self._ends_turns(token, turns, stand_in)
        return at + len(token) if closes else end

    def _ends_turns(self, token: str, turns: Sequence[Turn], stand_in: str) -> bool:
        """Whether this token still follows the assistant where a conversation stops after it."""
        if token not in self._ends:
            last = max(at for at, turn in enumerate(turns) if turn.role == ASSISTANT)
            stops = [*turns[:last], replace(turns[last], content=stand_in)]
            after = self._text(stops).partition(stand_in)[2].lstrip()
            self._ends[token] = self._special.at(after, 0) == token
        return self._ends[token]

    def _text(self, turns: Sequence[Turn], generate: bool = False) -> str:
        return self._rendered(turns, generate=generate)[0]

    def _text_and_marks(self, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
        """The text, and what the template itself marks as the assistant's."""
        text, marks = self._rendered(turns, marks=self._marked)
        return text, [(start, end) for start, end in marks if end > start]

    def _rendered(
        self, turns: Sequence[Turn], generate: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        try:
            texts, spans = render_jinja_template(
                conversations=[[{"role": t.role, "content": t.content} for t in turns]],
                chat_template=self._source,
                add_generation_prompt=generate,
                return_assistant_tokens_mask=marks,
                **self._names,
            )
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"{self.origin} is no Jinja template: {error.message} (line {error.lineno})"
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UsageError(
                f"{self.origin} refuses a conversation that begins {_beginning(turns)}, with the "
                f"roles {listing([turn.role for turn in turns])}: {quoted(error)}. Leave such "
                "conversations out, or name a template that takes them in data.chat-template-file"
            ) from None
        return str(texts[0]), list(spans[0]) if marks else []


def _find(tokenizer: Any, data: DataSettings) -> tuple[str, str]:
    """The template and where it comes from."""
    if data.chat_template_file:
        file = Path(data.chat_template_file).expanduser()
        try:
            return file.read_text(encoding="utf-8"), f"the chat template in {file}"
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UsageError(
                f"data.chat-template-file names {str(file)!r}, which cannot be read: {reason}"
            ) from None
    templates: str | Mapping[str, str] | None = getattr(tokenizer, "chat_template", None)
    source = templates.get("default") if isinstance(templates, Mapping) else templates
    if not source:
        raise UsageError(
            "this model's tokenizer has no chat template: name a file with one (Jinja) in "
            "data.chat-template-file; a file with prompt and response needs none: data.template "
            "formats it"
        )
    return source, "this model's chat template"


def _fixed_date() -> str:
    """A macro in place of the function that tells a template the date of today."""
    filters = "".join(f" | replace('{code}', '{text}')" for code, text in DATE.items())
    return "{%- macro strftime_now(format) -%}{{ format" + filters + " }}{%- endmacro -%}"


def _unused(text: str) -> tuple[str, str]:
    """Two characters that the text does not hold."""
    free = (chr(code) for code in PRIVATE if chr(code) not in text)
    return next(free), next(free)


def _without(places: Sequence[int], at: int) -> int:
    """A position in a text once the characters at these places are gone."""
    return at - sum(place < at for place in places)


def _beginning(turns: Sequence[Turn]) -> str:
    return repr(quoted(turns[0].content, limit=60))
