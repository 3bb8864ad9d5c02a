"""Conversations as files hold them: which columns they lie in, and the turns of a row.

messages        [{"role": "user", "content": "Hi"}, ...]             TRL, OpenAI
conversations   [{"from": "human", "value": "Hi"}, ...]              ShareGPT
prompt, completion (or data.prompt, data.response), each a list of messages    TRL
"""

from collections.abc import Mapping
from dataclasses import dataclass

from core.errors import UsageError, listing, quoted
from settings.run import DataSettings
from tasks.files import Cell

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {
    SYSTEM: SYSTEM,
    "developer": SYSTEM,
    USER: USER,
    "human": USER,
    ASSISTANT: ASSISTANT,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bard": ASSISTANT,
    "bing": ASSISTANT,
    "model": ASSISTANT,
}
"""What data sets call the three roles, in lower case."""
COLUMNS = ("messages", "conversations")
COMPLETION = "completion"
NOT_TEXT = (
    "tool_calls",
    "tool_call_id",
    "function_call",
    "tools",
    "reasoning_content",
    "thinking",
    "images",
    "image",
    "audio",
    "refusal",
)
"""Fields of a message that say something which the turn's text does not."""
WEIGHTS = ("weight", "train")
"""Fields of a message that say whether to learn it."""


@dataclass(frozen=True, order=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    """system, user or assistant."""
    content: str


def find_conversation(row: Mapping[str, Cell], data: DataSettings) -> tuple[str, ...]:
    """Names of the columns that hold a conversation, by a file's first row; none where none does.

    data.text, and prompt and response as text, are what they say, whatever else a file holds.

    >>> from settings.run import run_settings
    >>> row = {"id": "1", "messages": [{"role": "user", "content": "Hi"}]}
    >>> find_conversation(row, run_settings().data)
    ('messages',)
    """
    if data.text:
        return ()
    response = data.response if data.response in row else COMPLETION
    pair = (data.prompt, response)
    if all(isinstance(row.get(name), list) for name in pair):
        return pair
    if data.prompt in row and data.response in row:
        return ()
    for name in COLUMNS:
        if isinstance(row.get(name), list):
            return (name,)
    return ()


def read_turns(row: Mapping[str, Cell], columns: tuple[str, ...], where: str) -> tuple[Turn, ...]:
    """The turns of one row, those of its columns one after another.

    where: file and row, for messages. Nothing in place of the list is a conversation of no turns,
    and nothing in place of a turn's text is empty text.

    Raises UsageError for anything but a list of messages of known roles whose content is text.
    """
    turns: list[Turn] = []
    for column in columns:
        cell = row.get(column)
        if cell is None:
            continue
        place = f"{where}, column {column!r}"
        if not isinstance(cell, list):
            raise UsageError(f"{place}: expected a list of messages; got {_shown(cell)}")
        turns += [_turn(item, f"{place}, message {n}") for n, item in enumerate(cell, start=1)]
    return tuple(turns)


def _turn(item: Cell, where: str) -> Turn:
    if not isinstance(item, dict):
        raise UsageError(
            f'{where}: expected a message such as {{"role": "user", "content": "..."}}; got '
            f"{_shown(item)}"
        )
    role_key, text_key = ("from", "value") if "from" in item else ("role", "content")
    for name in (role_key, text_key):
        if name not in item and not (name == "content" and _says_more(item)):
            raise UsageError(
                f"{where} has no {name!r}; its fields are {listing(item)}. A message has role and "
                "content, or from and value"
            )
    if more := _says_more(item):
        raise UsageError(
            f"{where} holds {more!r}, which Bouquet does not train on: it takes messages of text "
            "alone. Put what should be learned into the text, or leave the row out"
        )
    for name in WEIGHTS:
        weight = item.get(name)
        if weight is not None and weight not in ("1", "1.0", "true"):
            raise UsageError(
                f"{where} has {name!r} {_shown(weight)}, and Bouquet learns every turn of the "
                "assistant alike: leave such rows out"
            )
    return Turn(_role(item[role_key], where), _content(item[text_key], f"{where}, {text_key!r}"))


def _says_more(item: Mapping[str, Cell]) -> str:
    """A field of the message that is no text and not empty; none: empty."""
    return next((name for name in NOT_TEXT if item.get(name)), "")


def _role(value: Cell, where: str) -> str:
    role = ROLES.get(value.lower()) if isinstance(value, str) else None
    if role is None:
        raise UsageError(
            f"{where} is of the role {_shown(value)}; known are {', '.join(ROLES)}. Rename it, or "
            "leave the row out"
        )
    return role


def _content(value: Cell, where: str) -> str:
    """Text, or the text of OpenAI's list of parts."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        raise UsageError(f"{where}: expected text; got {_shown(value)}")
    texts = []
    for number, part in enumerate(value, start=1):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            got = f"a part of type {_shown(kind)}" if isinstance(kind, str) else _shown(part)
            raise UsageError(f"{where}, part {number}: expected text; got {got}")
        texts.append(text)
    return "".join(texts)


def _shown(value: Cell) -> str:
    """A value for a message: its kind, and text to read where it has some."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return repr(quoted(value, limit=60))
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"an object with {listing(value)}" if value else "an empty object"
