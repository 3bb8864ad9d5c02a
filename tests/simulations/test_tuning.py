"""`bouquet compare --tune-rates`: each method its own rate, chosen where nothing is reported."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from core.errors import UsageError
from journal.record import read_rounds
from simulations.compare import Runner
from simulations.comparison_folder import Comparison, load_comparison
from simulations.tuning import Trial, Tuning, final_loss, parse_rates, tuning_seed
from tests.conftest import Run

RATES = "0.0001,0.03,0.003"
NAMES = "flora,fedsa-lora,central,local"


@pytest.fixture
def job(small_job: list[str]) -> list[str]:
    return ["compare", *small_job[1:], "--ranks", "2,2", "--set", "data.client-held-out=0.2"]


def results(folder: str) -> Any:
    return json.loads(Path(folder, "results.json").read_text())


def end(folder: Path) -> dict[str, Any]:
    return read_rounds(folder / "rounds.jsonl")[-1]


def test_each_method_runs_at_the_rate_that_was_best_on_a_seed_that_is_not_reported(
    bouquet: Run, job: list[str]
) -> None:
    command = [*job, "-s", NAMES, "--seeds", "2", "--tune-rates", RATES, "-o", "both"]
    code, out, errors = bouquet(*command)
    assert code == 0, errors
    found = results("both")
    assert {run["seed"] for run in found["runs"]} == {0, 1}
    for name in NAMES.split(","):
        own = name in ("fedsa-lora", "local")
        losses = {}
        for rate in (0.0001, 0.003, 0.03):
            trial = Path("both", "tuning", name, f"rate-{rate:g}")
            losses[rate] = end(trial)["client_held_out_loss" if own else "held_out_loss"]
            config = (trial / "config.toml").read_text()
            assert re.search(rf"seed *= *{tuning_seed(0)}\b", config)
        best = min(losses, key=losses.__getitem__)
        tuning = found["tuning"][name]
        assert tuning["chosen"] == best
        assert {t["rate"]: t["loss"] for t in tuning["trials"]} == losses
        assert tuning["at_end_of_list"] == (best != 0.003)
        assert f"{name}: takes rate {best:g} (" in out
        assert (f"{name}: {best:g} is at the end of --tune-rates" in out) == (best != 0.003)
        for seed in (0, 1):
            config = Path("both", "runs", name, f"seed-{seed}", "config.toml").read_text()
            assert re.search(rf"learning-rate *= *{best}\b", config)
    page = Path("both/report.html").read_text()
    assert "Learning rates" in page
    assert f"on seed {tuning_seed(0):,}".replace(",", "") in page.replace(",", "")
    code, again, errors = bouquet(*command)  # nothing is left to do
    assert code == 0, errors
    assert again.count("is done already") == 4 * 3 + 4 * 2
    assert results("both") == found


def test_a_stopped_tuning_goes_on_and_ends_the_same(
    bouquet: Run, job: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*job, "-s", "flora,fedavg", "--seeds", "1", "--tune-rates", RATES]
    assert bouquet(*command, "-o", "whole")[0] == 0
    tried = Comparison.tried

    def stop(self: Comparison, entry: Any, *found: Any) -> None:
        if entry.key == "fedavg/rate-0.003":
            raise KeyboardInterrupt
        tried(self, entry, *found)

    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "tried", stop)
        assert bouquet(*command, "-o", "torn")[0] == 130
    assert set(load_comparison(Path("torn")).trials) == {
        *(f"flora/rate-{rate}" for rate in ("0.0001", "0.003", "0.03")),
        "fedavg/rate-0.0001",
    }
    assert bouquet(*command, "-o", "torn")[0] == 0
    assert results("torn")["tuning"] == results("whole")["tuning"]
    for name in ("flora", "fedavg"):
        one, two = (
            Path(folder, "runs", name, "seed-0", "adapter", "adapter_model.safetensors")
            for folder in ("whole", "torn")
        )
        assert one.read_bytes() == two.read_bytes()


def test_a_rate_that_fails_counts_as_the_worst_and_a_method_that_fails_at_all_is_named(
    bouquet: Run, job: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Runner._attempt

    def fail(self: Runner, entry: Any, settings: Any) -> str | None:
        if entry.rate == 0.03 or (entry.rate and entry.name == "fedavg"):
            return "the training loss became nan at step 1"
        return attempt(self, entry, settings)

    monkeypatch.setattr(Runner, "_attempt", fail)
    command = [*job, "-s", "flora,fedavg", "--seeds", "1", "--tune-rates", "0.003,0.03", "-o", "x"]
    code, out, errors = bouquet(*command)
    assert code == 0, errors
    tuning = results("x")["tuning"]
    assert tuning["flora"]["chosen"] == 0.003
    assert tuning["flora"]["trials"][1] == {
        "rate": 0.03,
        "loss": None,
        "failure": "the training loss became nan at step 1",
    }
    assert tuning["fedavg"]["chosen"] is None
    assert "fedavg: every rate failed (0.003: failed, 0.03: failed)" in out
    failure = "it failed at every rate of --tune-rates: the training loss became nan at step 1"
    assert load_comparison(Path("x")).failures == {"fedavg/seed-0": failure}


def test_rates_must_be_the_same_when_a_comparison_goes_on(bouquet: Run, job: list[str]) -> None:
    command = [*job, "-s", "flora", "--seeds", "1", "-o", "x", "--steps", "1", "--rounds", "1"]
    assert bouquet(*command, "--tune-rates", "0.003,0.01")[0] == 0
    code, _, errors = bouquet(*command, "--tune-rates", "0.003,0.02")
    said = " ".join(errors.split())
    assert code == 2
    assert "with --tune-rates 0.003,0.01, and now it is --tune-rates 0.003,0.02" in said
    code, _, errors = bouquet(*command)
    assert code == 2
    assert "and now it is no --tune-rates" in " ".join(errors.split())


def test_one_rate_for_all_and_rates_to_choose_from_exclude_each_other(
    bouquet: Run, job: list[str]
) -> None:
    code, _, errors = bouquet(*job, "-s", "flora", "--lr", "0.01", "--tune-rates", RATES)
    assert code == 2
    assert "give one of the two" in " ".join(errors.split())


@pytest.mark.parametrize(
    "listed", ["", "x", "0.1", "0.1,0.1", "0.1,-1", "0.1,nan", "0.1,inf", "1,"]
)
def test_rates_that_are_none_are_refused(listed: str) -> None:
    with pytest.raises(UsageError, match="two learning rates or more, above zero"):
        parse_rates(listed)


def test_the_tuning_seed_is_none_that_is_reported_and_can_be_used() -> None:
    for first in (0, 7, 2**31):
        seed = tuning_seed(first)
        assert abs(seed - first) >= 1000
        assert 0 <= seed <= 2**31


def test_the_better_of_equal_losses_is_the_lower_rate() -> None:
    trials = (Trial(0.1, 2.0), Trial(0.2, 1.0), Trial(0.3, 1.0))
    assert Tuning(1, "held_out_loss", trials).chosen == 0.2


def test_the_loss_that_counts() -> None:
    base = {"round": 0, "held_out_loss": 5.0, "client_held_out_loss": 6.0}
    both = {"round": 1, "held_out_loss": 2.0, "client_held_out_loss": 3.0}
    own = {"round": 1, "client_held_out_loss": 3.0}
    assert final_loss("flora", [base, both]) == ("held_out_loss", 2.0)
    assert final_loss("local", [base, both]) == ("client_held_out_loss", 3.0)
    assert final_loss("fedsa-lora", [base, own]) == ("client_held_out_loss", 3.0)
    assert final_loss("flora", [base]) == ("held_out_loss", None)
    nan = {"round": 1, "held_out_loss": float("nan")}
    assert final_loss("flora", [base, nan]) == ("held_out_loss", None)
