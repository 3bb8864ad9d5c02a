"""Whoever brings data that cannot train is told the true reason, and of what file."""

from dataclasses import replace

import pytest

from settings.keys import Value
from settings.run import DataSettings, run_settings
from tasks.conversations import Turn
from tasks.encoding import encode
from tasks.examples import Example
from tasks.reasons import DROPPED, SENTENCES, count_lines, refusal
from tests.tasks.chat_formats import CHATML_TOKENS, QWEN25, byte_level


def data(**values: Value) -> DataSettings:
    layer = {f"data.{name}": value for name, value in values.items()}
    return run_settings({"data.path": "mine.jsonl"}, layer).data


def refused(examples: list[Example], settings: DataSettings) -> str:
    tokenizer = byte_level(*CHATML_TOKENS)
    tokenizer.chat_template = QWEN25
    encoding = encode(tokenizer, examples, settings)
    assert encoding.examples == []
    assert sum(encoding.counts.values()) == encoding.dropped == len(examples)
    files = sorted({example.file for example in examples})
    return str(refusal(encoding.counts, len(examples), files, settings, classes=False))


def test_the_message_names_the_true_reason() -> None:
    empty, long = Example("a", "", ""), Example("a" * 99, "b", "")
    silent = Example("", "", "", (Turn("user", "Hi"),))
    assert refused([empty] * 3, data()) == (
        "all 3 responses are empty: fill them, or name their field with data.response"
    )
    assert refused([replace(empty, file="/data/c2.jsonl")] * 3, data()) == (
        "all 3 responses of /data/c2.jsonl are empty: fill them, or name their field with "
        "data.response"
    )
    narrow = {"context": 8, "max-prompt": 50}
    assert refused([long], data(**narrow)) == (
        "none of 1 examples leaves room for a response within data.context=8 tokens: raise it, or "
        "lower data.max-prompt"
    )
    assert refused([silent], data()).startswith(
        "none of 1 conversations has a turn of the assistant, so there is nothing to learn: check "
    )
    assert refused([empty, long, silent, empty], data(**narrow)) == (
        "none of 4 examples can be used: 2 examples: left out, the response or text is empty; "
        "1 example: left out, data.context=8 leaves no room for a response; "
        "1 example: left out, no turn is the assistant's"
    )


@pytest.mark.parametrize("reason", SENTENCES)
def test_every_reason_has_a_line(reason: str) -> None:
    (line,) = count_lines({reason: 1200, "cut of another": 0}, data())
    assert line.startswith("1,200 examples: ")
    assert ("left out" in line) == (reason in DROPPED)
    assert count_lines({reason: 0}, data()) == []


def test_no_examples_at_all_is_said_as_it_is() -> None:
    message = str(refusal({}, 0, [], data(), classes=False))
    assert message == "there is no example here to train on or to evaluate"
