"""The fuzzer that `make fuzz` runs: it finds nothing here, and would find what is there."""

import importlib
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def fuzzer() -> Any:
    """As a module, on whose names the tests lay their hands."""
    return importlib.import_module("tools.fuzz_codec")


def run(fuzzer: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fuzz_codec.py", *map(str, arguments)])
    with warnings.catch_warnings():
        return int(fuzzer.main())


def test_two_thousand_damaged_payloads_break_nothing_and_get_everywhere(fuzzer: Any) -> None:
    endings = Counter(fuzzer.play(3, case)[1] for case in range(2000))
    assert endings["admitted"] > 20
    reached = " ".join(endings)
    for check in (
        "not valid JSON",
        "does not match the",
        "should lie at bytes",
        "must be followed by its .scales",
        "values that are not finite",
        "follow the last tensor",
        "the head is not in safetensors form",
    ):
        assert check in reached


def test_a_case_can_be_played_again(fuzzer: Any) -> None:
    assert [fuzzer.play(5, 17) for _ in range(2)] == [fuzzer.play(5, 17)] * 2
    assert fuzzer.play(5, 18)[0] != fuzzer.play(5, 17)[0] != fuzzer.play(6, 17)[0]


def test_a_broken_decoder_is_found_and_written_down(
    fuzzer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = fuzzer.unpack

    def broken(payload: bytes, *rest: Any) -> Any:
        if b'"BF16"' in payload:
            raise KeyError("a decoder that trusts what it reads")
        return whole(payload, *rest)

    monkeypatch.setattr(fuzzer, "unpack", broken)
    arguments = ("--cases", 60, "--seed", 1, "--crashes", tmp_path / "crashes")
    assert run(fuzzer, monkeypatch, *arguments) == 1
    found = sorted((tmp_path / "crashes").glob("seed-1-case-*.bin"))
    assert found
    assert all(b'"BF16"' in file.read_bytes() for file in found)
    assert all("trusts what it reads" in f.with_suffix(".txt").read_text() for f in found)
    monkeypatch.setattr(fuzzer, "unpack", whole)
    assert run(fuzzer, monkeypatch, *arguments) == 0
