"""A template names fields in braces, and whatever else a brace could mean is a clear mistake."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UsageError
from settings.run import run_settings
from settings.templates import Field, parts_for, template_fields, template_parts
from tests.adapter_generators import QUICK


@pytest.mark.parametrize(
    ("template", "fields"),
    [
        ("{prompt}", ("prompt",)),
        ("{b}{a}{b}", ("b", "a")),
        ("{{not}} {yes}", ("yes",)),
        ("{{{inner}}}", ("inner",)),
        ('{{"question": "{question}", "n": {{}}}}', ("question",)),
        ("{user id} {köln-2} {_x}", ("user id", "köln-2", "_x")),
        ("alpaca", ("instruction", "input")),
    ],
)
def test_fields_come_each_once_in_their_order(template: str, fields: tuple[str, ...]) -> None:
    assert template_fields(template) == fields


@pytest.mark.parametrize(
    "template",
    [
        '{"question": "{prompt}"}',
        "{prompt",
        "prompt}",
        "{prompt} {}",
        "{prompt} {0}",
        "{a.b}",
        "{a[0]}",
        "{a!r}",
        "{a:>9}",
        "{ a }",
        "{a }",
        "{{a}",
    ],
)
def test_a_brace_that_names_no_field_is_refused(template: str) -> None:
    with pytest.raises(
        ValueError, match=r"a brace that names no field, in .+: write {{ and }} for"
    ):
        template_fields(template)
    with pytest.raises(UsageError, match=r"^data\.template: a brace that names no field"):
        run_settings({"data.template": template})


def test_a_template_without_a_field_or_with_the_response_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected auto, a preset \(alpaca\), or text that names"):
        template_fields("{{prompt}}")
    for values in (
        {"data.template": "{prompt} {response}"},
        {"data.template": "{prompt} {output}", "data.response": "output"},
    ):
        with pytest.raises(
            UsageError, match=r"which is the response \(data\.response\): that follo"
        ):
            run_settings({"data.path": "mine.jsonl", **values})


def test_a_preset_says_where_the_response_is() -> None:
    alpaca = {"data.path": "mine.jsonl", "data.template": "alpaca"}
    assert run_settings(alpaca).data.response == "output"
    assert run_settings(alpaca, {"data.response": "answer"}).data.response == "answer"
    assert run_settings({"data.path": "mine.jsonl"}).data.response == "response"


@QUICK
@given(
    st.lists(st.tuples(st.text("ab{} \n", max_size=6), st.sampled_from(["x", "y z"]))),
    st.text("a{}"),
)
def test_what_str_format_makes_of_it(pieces: list[tuple[str, str]], tail: str) -> None:
    """The oracle is str.format, with all braces in the text written twice."""
    doubled = [text.replace("{", "{{").replace("}", "}}") for text, _ in pieces]
    tail_doubled = tail.replace("{", "{{").replace("}", "}}")
    template = "".join(f"{text}{{{name}}}" for text, (_, name) in zip(doubled, pieces, strict=True))
    values = {"x": "1{x}", "y z": "}2"}
    parts = template_parts(template + tail_doubled)
    filled = "".join(values[part.name] if isinstance(part, Field) else part for part in parts)
    assert filled == (template + tail_doubled).format(**values)
    assert isinstance(parts[0], str)
    assert isinstance(parts[-1], str)


def test_the_preset_chooses_by_what_is_empty() -> None:
    given_input = parts_for("alpaca", {"instruction": "a", "input": "b"})
    empty = parts_for("alpaca", {"instruction": "a", "input": " \n"})
    assert [part.name for part in given_input if isinstance(part, Field)] == [
        "instruction",
        "input",
    ]
    assert [part.name for part in empty if isinstance(part, Field)] == ["instruction"]
    assert parts_for("{a}", {"a": ""}) == ["", Field("a"), ""]
