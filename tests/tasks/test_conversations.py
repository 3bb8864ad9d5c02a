"""Conversations are found where files hold them, and what is no text is refused by its name."""

import pytest

from core.errors import UsageError
from settings.keys import Value
from settings.run import DataSettings, run_settings
from tasks.conversations import Cell, Turn, find_conversation, read_turns

TURNS = (Turn("system", "Be brief."), Turn("user", "1 + 1?"), Turn("assistant", "2"))
MESSAGES: list[Cell] = [{"role": turn.role, "content": turn.content} for turn in TURNS]
SHAREGPT: list[Cell] = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "1 + 1?"},
    {"from": "gpt", "value": "2"},
]


def data(**values: Value) -> DataSettings:
    layer = {f"data.{name}": value for name, value in values.items()}
    return run_settings({"data.path": "mine.jsonl"}, layer).data


@pytest.mark.parametrize(
    ("row", "values", "columns"),
    [
        ({"messages": MESSAGES}, {}, ("messages",)),
        ({"prompt": "1 + 1?", "prompt_id": "7", "messages": MESSAGES}, {}, ("messages",)),
        ({"id": "1", "conversations": SHAREGPT}, {}, ("conversations",)),
        ({"prompt": MESSAGES[:2], "completion": MESSAGES[2:]}, {}, ("prompt", "completion")),
        ({"prompt": MESSAGES[:2], "response": MESSAGES[2:]}, {}, ("prompt", "response")),
        (
            {"q": MESSAGES[:2], "a": MESSAGES[2:]},
            {"prompt": "q", "response": "a"},
            ("q", "a"),
        ),
        ({"prompt": "1 + 1?", "response": "2", "messages": MESSAGES}, {}, ()),
        ({"text": "1 + 1 = 2", "messages": MESSAGES}, {"text": "text"}, ()),
        ({"prompt": "1 + 1?", "response": "2"}, {}, ()),
        ({"messages": "hello"}, {}, ()),
        ({"prompt": MESSAGES[:2], "completion": "2"}, {}, ()),
        ({}, {}, ()),
    ],
)
def test_a_conversation_is_found_without_configuration(
    row: dict[str, Cell], values: dict[str, Value], columns: tuple[str, ...]
) -> None:
    assert find_conversation(row, data(**values)) == columns


def test_all_layouts_are_the_same_turns() -> None:
    assert read_turns({"messages": MESSAGES}, ("messages",), "a.jsonl, row 1") == TURNS
    assert read_turns({"conversations": SHAREGPT}, ("conversations",), "a.jsonl, row 1") == TURNS
    row: dict[str, Cell] = {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]}
    assert read_turns(row, ("prompt", "completion"), "a.jsonl, row 1") == TURNS


@pytest.mark.parametrize(
    ("message", "turn"),
    [
        ({"role": "USER", "content": "Hi"}, Turn("user", "Hi")),
        ({"role": "developer", "content": "Hi"}, Turn("system", "Hi")),
        ({"from": "chatgpt", "value": "Hi"}, Turn("assistant", "Hi")),
        ({"from": "bard", "value": ""}, Turn("assistant", "")),
        ({"role": "assistant", "content": None}, Turn("assistant", "")),
        ({"role": "assistant", "content": "Hi", "tool_calls": None}, Turn("assistant", "Hi")),
        ({"role": "assistant", "content": "Hi", "tool_calls": []}, Turn("assistant", "Hi")),
        ({"role": "user", "content": "Hi", "name": "Ann", "weight": "1"}, Turn("user", "Hi")),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}],
            },
            Turn("user", "Hi"),
        ),
        ({"role": "user", "content": "2021-03-01"}, Turn("user", "2021-03-01")),
    ],
)
def test_a_message_is_a_role_and_its_text(message: Cell, turn: Turn) -> None:
    assert read_turns({"messages": [message]}, ("messages",), "a.jsonl, row 1") == (turn,)


def test_nothing_is_a_conversation_of_no_turns() -> None:
    assert read_turns({"messages": None}, ("messages",), "a.jsonl, row 1") == ()
    assert read_turns({"messages": []}, ("messages",), "a.jsonl, row 1") == ()


def refused(cell: Cell) -> str:
    with pytest.raises(UsageError) as caught:
        read_turns({"messages": cell}, ("messages",), "a.jsonl, row 7")
    message = str(caught.value)
    assert message.startswith("a.jsonl, row 7, column 'messages'")
    return message.removeprefix("a.jsonl, row 7, column 'messages'")


def test_what_is_no_list_of_messages_is_refused() -> None:
    assert refused("hello") == ": expected a list of messages; got 'hello'"
    assert refused({"role": "user"}) == ": expected a list of messages; got an object with role"
    expected = ', message 2: expected a message such as {"role": "user", "content": "..."}; got '
    assert refused([MESSAGES[0], "hello"]) == expected + "'hello'"
    assert refused([MESSAGES[0], ["a", "b"]]) == expected + "a list of 2"
    assert refused([MESSAGES[0], None]) == expected + "nothing"


def test_a_message_without_role_or_text_is_refused() -> None:
    assert refused([{"role": "user", "text": "Hi"}]) == (
        ", message 1 has no 'content'; its fields are role, text. A message has role and content, "
        "or from and value"
    )
    assert refused([{"content": "Hi"}]).startswith(", message 1 has no 'role'; its fields are con")
    assert refused([{"from": "human"}]).startswith(", message 1 has no 'value'; its fields are fr")


@pytest.mark.parametrize("role", ["tool", "function", "observation", "1", ""])
def test_an_unknown_role_is_refused(role: str) -> None:
    assert refused([{"role": role, "content": "Hi"}]).startswith(
        f", message 1 is of the role {role!r}; known are system, developer, user, human, assistant,"
    )


@pytest.mark.parametrize(
    "more",
    [
        {"tool_calls": [{"id": "1"}]},
        {"function_call": {"name": "f"}},
        {"reasoning_content": "Let me think."},
        {"images": ["a.png"]},
    ],
)
def test_what_a_message_says_beside_its_text_is_refused_by_name(more: dict[str, Cell]) -> None:
    name = next(iter(more))
    expected = f", message 1 holds {name!r}, which Bouquet does not train on: it takes messages of"
    assert refused([{"role": "assistant", "content": None, **more}]).startswith(expected)
    assert refused([{"role": "assistant", **more}]).startswith(expected)


def test_a_turn_that_is_not_to_be_learned_is_refused() -> None:
    assert refused([{"role": "assistant", "content": "Hi", "weight": "0"}]) == (
        ", message 1 has 'weight' '0', and Bouquet learns every turn of the assistant alike: leave "
        "such rows out"
    )


def test_content_that_is_no_text_is_refused_by_name() -> None:
    def content(value: Cell) -> str:
        return refused([{"role": "user", "content": value}])

    assert (
        content({"text": "Hi"}) == ", message 1, 'content': expected text; got an object with text"
    )
    image: Cell = {"type": "image_url", "image_url": {"url": "a.png"}}
    assert content([{"type": "text", "text": "Hi"}, image]) == (
        ", message 1, 'content', part 2: expected text; got a part of type 'image_url'"
    )
    assert content(["Hi"]) == ", message 1, 'content', part 1: expected text; got 'Hi'"
    assert content([{"type": "text"}]).endswith("part 1: expected text; got a part of type 'text'")
