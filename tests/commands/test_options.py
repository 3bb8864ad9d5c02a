"""`bouquet options`: readable at any width, and only what was asked for."""

import re

import pytest

from settings.keys import KINDS, shown_value, walk
from settings.run import RunSettings, default_values
from strategies.registry import STRATEGIES, knob_values, knobs_in
from tests.conftest import Run

KEYS = {name: rule for name, _, rule in walk(RunSettings)} | {
    f"strategy.{name}.{knob}": rule for name in STRATEGIES for knob, _, rule in knobs_in(name)
}
KINDS_OF_VALUES = {word for kind in KINDS.values() for word in f"{kind} {kind},".split()}
LONGEST_WORD = max(len(word) for rule in KEYS.values() for word in rule.doc.split())


@pytest.fixture(params=[60, 80, 200])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


def entries(out: str) -> dict[str, tuple[str, str]]:
    """Key -> (its default, what stands below it on one line)."""
    parts = re.split(r"^  ([a-z0-9.-]+) = (.*)\n", out, flags=re.M)[1:]
    return {
        name: (default, " ".join(below.split()))
        for name, default, below in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    }


def test_every_key_stands_with_its_default_range_and_meaning(bouquet: Run, width: int) -> None:
    code, out, err = bouquet("options")
    assert (code, err) == (0, "")
    found, defaults = entries(out), default_values()
    for strategy in STRATEGIES:
        defaults |= {f"strategy.{strategy}.{n}": v for n, v in knob_values(strategy).items()}
    assert set(found) == set(KEYS)
    for name, rule in KEYS.items():
        default, below = found[name]
        assert default == shown_value(defaults[name])
        assert below.startswith(rule.doc)
        assert rule.range() in below


def test_no_line_is_longer_than_the_terminal_and_no_word_is_broken(
    bouquet: Run, width: int
) -> None:
    _, out, _ = bouquet("options")
    lines = [line for line in out.splitlines() if line.startswith(" " * 6)]
    assert len(lines) >= len(KEYS)
    assert max(map(len, lines)) <= max(width, 6 + LONGEST_WORD)
    assert max(map(len, lines)) <= 100  # long lines are hard to read
    whole = {word for rule in KEYS.values() for word in f"{rule.doc} {rule.range()}".split()}
    assert {word for line in lines for word in line.split()} <= whole | KINDS_OF_VALUES
    assert all(line == line.rstrip() for line in out.splitlines())


def test_words_choose_by_name_and_by_meaning(bouquet: Run) -> None:
    lora = entries(bouquet("options", "lora")[1])
    assert {name for name in KEYS if name.startswith("lora.")} <= set(lora)
    assert "strategy.energy" not in lora  # its meaning has flora in it
    assert set(entries(bouquet("options", "LoRA", "dropout")[1])) == {"lora.dropout"}
    assert set(entries(bouquet("options", "max_steps")[1])) == {"local.max-steps"}
    assert "local.schedule" in entries(bouquet("options", "learning")[1])  # by its meaning
    either = set(entries(bouquet("options", "rslora", "warmup")[1]))  # no key has both
    assert {"lora.rslora", "local.warmup"} <= either
    assert "lora.alpha" not in either


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["lr"], "; the nearest key is local.learning-rate."),
        (["load_in_4bit"], "; the nearest key is model.quantization=nf4."),
        (["learnign-rate"], "; the nearest key is local.learning-rate."),
        (["qqqqq"], "'qqqqq' in its name or meaning. "),
    ],
)
def test_what_matches_nothing_is_told_the_nearest_key(
    bouquet: Run, words: list[str], near: str
) -> None:
    code, out, err = bouquet("options", *words)
    assert (code, out) == (2, "")
    assert near in " ".join(err.split())
