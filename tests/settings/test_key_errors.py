"""Every bad key and value is an error that names the key, what was expected and what came."""

import datetime
import math
import re

import pytest

from core.errors import UsageError
from settings.keys import (
    Rule,
    Value,
    coerce,
    flatten_tables,
    parse,
    read_assignment,
    unknown_key,
    walk,
)
from settings.run import (
    LoraSettings,
    RunSettings,
    default_values,
    parse_alpha,
    parse_ranks,
    run_settings,
)
from settings.site import parse_site
from settings.synonyms import SYNONYMS

KEYS = {name: (kind, rule) for name, kind, rule in walk(RunSettings)}
BOUNDED = {name: rule for name, (kind, rule) in KEYS.items() if kind in (int, float)}


def refusal(name: str, value: Value) -> str:
    """The message that this value of this key gets."""
    with pytest.raises(UsageError) as caught:
        run_settings({name: value})
    return str(caught.value)


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("local.learningrate", "local.learning-rate"),
        ("lora.ranks", "lora.rank"),
        ("local.learning_rate", "local.learning-rate"),
        ("round", "rounds"),
        ("local.lr", "local.learning-rate"),
        ("lr", "local.learning-rate"),
        ("training.lr", "local.learning-rate"),
        ("lora.r", "lora.rank"),
        ("lora.lora_alpha", "lora.alpha"),
        ("local.batch_size", "local.batch-size"),
        ("Batch_Size", "local.batch-size"),
        ("local.per_device_train_batch_size", "local.batch-size"),
        ("data.max-length", "data.context"),
        ("data.max_seq_length", "data.context"),
        ("data.eval", "data.evaluation"),
        ("data.eval-data", "data.evaluation"),
        ("data.output", "data.response"),
        ("num_rounds", "rounds"),
        ("num-server-rounds", "rounds"),
        ("num_clients", "clients.count"),
        ("clients.fraction_fit", "clients.fraction"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(typed: str, near: str) -> None:
    message = refusal(typed, 1)
    assert message.startswith(
        f"unknown configuration key {typed!r}; the nearest known key is {near}."
    )
    assert "`bouquet options`" in message


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("model.load-in-4bit", "model.quantization=nf4"),
        ("load_in_8bit", "model.quantization=int8"),
        ("local.bf16", "local.precision=bfloat16"),
    ],
)
def test_a_switch_of_another_program_is_named_as_a_value(typed: str, meant: str) -> None:
    message = refusal(typed, True)
    assert f"unknown configuration key {typed!r}; here this is {meant}." in message
    run_settings(dict([read_assignment(meant)]))


def test_a_synonym_leads_to_a_key_and_is_none_itself() -> None:
    for typed, meant in SYNONYMS.items():
        assert typed not in KEYS
        assert meant.partition("=")[0] in KEYS
        assert typed == typed.lower().replace("_", "-")
        assert f" {meant}." in unknown_key(typed, list(KEYS))


def test_a_site_is_told_of_its_own_keys_only() -> None:
    with pytest.raises(UsageError, match=r"'data_path'; the nearest known key is data-path\."):
        parse_site({"data_path": "a.jsonl"})
    with pytest.raises(UsageError) as caught:
        parse_site({"lr": 1})
    assert "local" not in str(caught.value)


def test_a_key_near_to_none_gets_no_hint() -> None:
    assert "nearest" not in unknown_key("zzzzzzzzz", list(KEYS))
    assert "'zzzzzzzzz'" in unknown_key("zzzzzzzzz", list(KEYS))


def test_an_unknown_key_below_a_section_is_refused_in_a_section_too() -> None:
    with pytest.raises(UsageError, match=r"'lora.rnk'; the nearest known key is lora.rank"):
        parse(LoraSettings, {**default_values(), "lora.rnk": 1}, "lora.")


@pytest.mark.parametrize("name", KEYS)
def test_each_key_is_missed_where_it_is_missing(name: str) -> None:
    values = default_values()
    del values[name]
    with pytest.raises(UsageError, match=f"^configuration key {re.escape(name)} is missing; expec"):
        parse(RunSettings, values)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("rounds", "three", "a whole number, at least 1"),
        ("rounds", 2.0, "a whole number, at least 1"),
        ("rounds", True, "a whole number, at least 1"),
        ("local.learning-rate", "fast", "a number, at least 0"),
        ("local.learning-rate", True, "a number, at least 0"),
        ("resume", 1, "true or false"),
        ("resume", "true", "true or false"),
        ("model.path", True, "text"),
        ("wire.dtype", 16, "text, one of float32, bfloat16, float16, int8"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name: str, value: Value, expected: str) -> None:
    message = refusal(name, value)
    came = repr(str(value)) if name == "wire.dtype" else repr(value)
    assert message.startswith(f"{name} must be {expected}; got {came}. It means: ")
    assert message.endswith(KEYS[name][1].doc)


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_may_be_nan_or_infinite(name: str, value: float) -> None:
    assert refusal(name, value).startswith(f"{name} must be ")


def plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def test_a_large_bound_is_written_out() -> None:
    assert "at most 2147483648" in refusal("seed", 2**31 + 1)


@pytest.mark.parametrize("name", BOUNDED)
def test_a_number_beyond_its_bounds_is_refused_and_its_bound_is_not(name: str) -> None:
    kind, rule = KEYS[name]
    assert rule.at_least is not None or rule.above is not None, "any number would do"
    step = 1 if kind is int else 1e-6
    if rule.at_least is not None:
        assert f"at least {rule.at_least:g}" in refusal(name, kind(rule.at_least - step))
        assert run_settings({name: kind(rule.at_least)})
    if rule.above is not None:
        assert f"above {rule.above:g}" in refusal(name, kind(rule.above))
        assert run_settings({name: kind(rule.above + step)})
    if rule.at_most is not None:
        assert f"at most {plain(rule.at_most)}" in refusal(name, kind(rule.at_most + step))
        assert run_settings({name: kind(rule.at_most)})


@pytest.mark.parametrize("name", [name for name, (_, rule) in KEYS.items() if rule.one_of])
def test_a_choice_is_one_of_those_named(name: str) -> None:
    rule = KEYS[name][1]
    assert f"one of {', '.join(rule.one_of)}; got 'neither'" in refusal(name, "neither")
    for choice in rule.one_of:
        assert run_settings({name: choice})


def test_a_whole_number_will_do_for_a_number() -> None:
    settings = run_settings({"local.weight-decay": 1})
    assert (settings.local.weight_decay, type(settings.local.weight_decay)) == (1.0, float)


@pytest.mark.parametrize("text", ["", "0", "8,0", "-4", "8,,4", "8;4", "eight", "2.5", "8,"])
def test_a_bad_list_of_ranks_is_refused(text: str) -> None:
    message = refusal("lora.rank", text)
    assert message.startswith("lora.rank: expected whole numbers of at least 1, separated by comma")
    assert f"got {text!r}" in message


@pytest.mark.parametrize("text", ["", "r", "0", "0r", "-2r", "2 r r", "2x", "nan", "inf", "r2"])
def test_a_bad_alpha_is_refused(text: str) -> None:
    message = refusal("lora.alpha", text)
    assert "lora.alpha: expected a number above 0, or a multiple of the rank such as 2r" in message
    assert f"got {text!r}" in message


def test_good_ranks_and_alphas_are_read() -> None:
    assert parse_ranks(" 64 ,8") == (64, 8)
    assert parse_alpha(" 1.5 r ") == (1.5, True)
    assert parse_alpha("32") == (32.0, False)


def test_a_template_must_name_a_field() -> None:
    assert refusal("data.template", "Question:\n").startswith(
        "data.template: expected auto, a preset (alpaca), or text that names a field in braces "
        "such as {prompt}; got 'Question:\\n'. It mea"
    )


def test_numbers_become_text_only_where_text_is_expected() -> None:
    coerced = coerce({"lora.rank": 8, "lora.alpha": 1.5, "rounds": 2, "resume": True}, RunSettings)
    assert coerced == {"lora.rank": "8", "lora.alpha": "1.5", "rounds": 2, "resume": True}
    assert coerce({"model.path": True}, RunSettings) == {"model.path": True}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("rounds=4", "rounds", 4),
        (" rounds = 4 ", "rounds", 4),
        ("local.learning-rate=2e-4", "local.learning-rate", 2e-4),
        ("resume=true", "resume", True),
        ("strategy.name=flora", "strategy.name", "flora"),
        ('strategy.name="flora"', "strategy.name", "flora"),
        ("lora.rank=8", "lora.rank", 8),
        ("lora.rank=64,32", "lora.rank", "64,32"),
        ("lora.rank=[64, 32]", "lora.rank", "64,32"),
        ("data.template={prompt}\n", "data.template", "{prompt}\n"),
        ("data.template=a={prompt}", "data.template", "a={prompt}"),
        ("output=", "output", ""),
        ("output=2026-11-23", "output", "2026-11-23"),
    ],
)
def test_an_assignment_is_toml_or_else_text(text: str, name: str, value: Value) -> None:
    assert read_assignment(text) == (name, value)


@pytest.mark.parametrize("text", ["rounds", "", "=4", "  =4"])
def test_an_assignment_needs_key_and_value(text: str) -> None:
    with pytest.raises(UsageError, match=r"expects key=value, such as local.max-steps=4; got"):
        read_assignment(text)


def test_a_table_may_hold_only_plain_values() -> None:
    with pytest.raises(
        UsageError, match=r"^local.epochs must be a number, text, true or false; go"
    ):
        flatten_tables({"local": {"epochs": datetime.date(2026, 1, 1)}})


def test_rules_name_their_range_in_words() -> None:
    assert Rule("", at_least=0, at_most=0.5).range() == "at least 0, at most 0.5"
    assert Rule("", one_of=("a", "b")).range() == "one of a, b"
    assert Rule("").range() == ""
