"""bouquet check: each line tells what is so, or what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from commands.cli import cli
from deployment.connection_checks import check_connection
from deployment.findings import Finding, Verdict
from deployment.folder import create_deployment
from deployment.memory import estimate_memory
from deployment.plan import Plan
from deployment.site_checks import check_site, estimate_for
from deployment.site_file import read_site
from deployment.superlink_probe import clock_difference
from settings.keys import Value
from settings.site import Site
from tools.rehearsal.loopback import free_ports
from tools.rehearsal.tiny_models import open_model, settings_for


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    lines = [{"prompt": f"what is {k}?", "response": f"it is {k * k}"} for k in range(40)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def looked_at(site: Site, model: Path, identity: str = "", **keys: Value) -> dict[str, Finding]:
    found = check_site(site, settings_for(model, **keys), identity)
    return {finding.subject: finding for finding in found}


def site_of(data: Path, model: Path, **others: str | int) -> Site:
    paths = {"data_path": str(data), "model_path": str(model), "device": "cpu"}
    return Site("oslo", 0, **(paths | {"rank": 4, "cache_path": str(data.parent)} | others))  # type: ignore[arg-type]


def test_a_site_that_can_join(data: Path, llama_folder: Path) -> None:
    identity = open_model(llama_folder).base.identity
    found = looked_at(site_of(data, llama_folder), llama_folder, identity)
    assert {finding.verdict for finding in found.values()} == {Verdict.OK}
    subjects = ["device", "base model", "data", "rank", "memory", "disk"]
    assert list(found) == subjects
    assert found["data"].sentence == "36 examples to train on, 4 held out"


def test_a_test_set_of_the_sites_own_is_checked_with_its_data(
    data: Path, llama_folder: Path, tmp_path: Path
) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text('{"prompt": "what is 0?", "response": "it is 0"}\n' * 2)
    data.write_text(data.read_text() + '\n{"prompt": "p", "response": null}')
    found = looked_at(site_of(data, llama_folder, evaluation_path=str(test)), llama_folder)
    assert found["data"].sentence == (
        "40 examples to train on, 2 to test; 1 example: left out, the response or text is null; "
        "to test: 1 example: the same as an earlier one; "
        "to test: 2 examples: in the test set and in the training data"
    )
    found = looked_at(site_of(data, llama_folder, evaluation_path="gone"), llama_folder)
    assert found["data"].verdict is Verdict.MEND
    assert "evaluation-path names 'gone', where there is no file" in found["data"].sentence


@pytest.mark.parametrize(
    ("others", "keys", "subject", "words"),
    [
        ({"rank": 13}, {}, "rank", "take at most 12"),
        ({"data_path": "/nowhere.jsonl"}, {}, "data", "/nowhere.jsonl"),
        ({"model_path": "/nowhere"}, {}, "base model", "there is no folder /nowhere"),
        ({"device": "tpu9"}, {}, "device", "device must be auto, cpu, cuda"),
        ({}, {"data__prompt": "question"}, "data", "has no field 'question'"),
        ({}, {"lora__target_modules": "nope"}, "base model", "matches no linear layer"),
    ],
)
def test_what_cannot_work_is_to_be_mended(
    data: Path,
    llama_folder: Path,
    others: dict[str, str],
    keys: dict[str, Value],
    subject: str,
    words: str,
) -> None:
    found = looked_at(site_of(data, llama_folder, **others), llama_folder, **keys)
    assert found[subject].verdict is Verdict.MEND
    assert words in found[subject].sentence
    assert [f.subject for f in found.values() if f.verdict is Verdict.MEND] == [subject]


def test_other_weights_are_told_from_the_announced_ones(data: Path, llama_folder: Path) -> None:
    found = looked_at(site_of(data, llama_folder), llama_folder, "0123456789abcdef")
    assert found["base model"].verdict is Verdict.MEND
    assert "the coordinator's is 0123456789abcdef" in found["base model"].sentence


def test_less_than_a_batch_is_said(data: Path, llama_folder: Path) -> None:
    found = looked_at(site_of(data, llama_folder), llama_folder, local__batch_size=64)
    assert found["data"].verdict is Verdict.NOTE
    assert "less than one batch of 64" in found["data"].sentence


def test_more_memory_than_is_free(
    data: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployment.site_checks.free_memory", lambda: 10**6)
    found = looked_at(site_of(data, llama_folder), llama_folder)
    assert found["memory"].verdict is Verdict.MEND
    assert "lower rank in site.toml" in found["memory"].sentence
    monkeypatch.setattr("deployment.site_checks.free_memory", lambda: 10**3)
    found = looked_at(site_of(data, llama_folder), llama_folder)
    assert list(found) == ["device", "memory"]
    assert "the weights alone take" in found["memory"].sentence


def test_memory_is_counted_from_what_is_there(llama_folder: Path) -> None:
    tuned = open_model(llama_folder)
    settings = settings_for(llama_folder, local__batch_size=2)
    weights = sum(p.numel() * 4 for p in tuned.model.parameters())
    adapted = sum(m * n for m, n in tuned.shapes.values())
    one, two = (estimate_for(tuned, settings, rank) for rank in (1, 2))
    assert one.weights == weights + 4 * adapted
    assert two.adapter == 2 * one.adapter == 2 * 16 * sum(m + n for m, n in tuned.shapes.values())
    shapes = {"q": (8, 8)}
    small, large = (estimate_memory(shapes, 0, 4, 0, 1, tokens).activations for tokens in (1, 7))
    assert large == 7 * small > 0


def test_the_memory_of_a_quantized_base_is_that_of_its_codes_and_a_branch_beside_it(
    llama_folder: Path,
) -> None:
    whole, packed = (open_model(llama_folder, quantization=q) for q in ("none", "nf4"))
    settings = settings_for(llama_folder, clients__count=2, lora__rank="1", rounds=2)
    exact, small = (estimate_for(tuned, settings, 1).weights for tuned in (whole, packed))
    assert small < 0.6 * exact
    branch = 4 * sum(min(m * n, 4 * (m + n)) for m, n in whole.shapes.values())
    assert small - branch == sum(p.numel() * p.element_size() for p in packed.model.parameters())


def takes_from(difference: float) -> Callable[[float], bool]:
    return lambda ahead: difference - 305 < ahead < difference + 5


@pytest.mark.parametrize("difference", [0.0, 3.3, -4.9, -6.0, 299.0, 310.0, -1700.0, 3000.0])
def test_the_clock_is_found_from_what_time_stamps_are_taken(difference: float) -> None:
    found = clock_difference(takes_from(difference))
    assert found == pytest.approx(difference, abs=0.11)


def test_a_clock_that_is_hours_away_is_not_looked_for() -> None:
    assert clock_difference(takes_from(50_000.0)) is None


def test_where_nothing_listens(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    plan = Plan("trial", "localhost", fleet_port=port)
    create_deployment(tmp_path / "trial", plan, ["oslo"], sites_make_keys=True)
    site = read_site(tmp_path / "trial" / "sites" / "oslo")
    found = {finding.subject: finding for finding in check_connection(site)}
    assert list(found) == ["key", "port", "certificate"]
    assert "bouquet deploy key" in found["key"].sentence
    assert f"no connection to localhost:{port}" in found["certificate"].sentence
    assert "Does the SuperLink run" in found["certificate"].sentence


def test_a_key_that_others_may_read(tmp_path: Path) -> None:
    plan = Plan("trial", "localhost", fleet_port=free_ports(1)[0])
    create_deployment(tmp_path / "trial", plan, ["oslo"], sites_make_keys=False)
    key = tmp_path / "trial" / "sites" / "oslo" / "node.key"
    key.chmod(0o640)
    found = next(iter(check_connection(read_site(key.parent))))
    assert found.verdict is Verdict.MEND
    assert f"chmod 600 {key}" in found.sentence


@pytest.mark.parametrize(("rank", "code"), [(4, 0), (99, 1)])
def test_the_exit_code_says_whether_anything_is_to_mend(
    data: Path, llama_folder: Path, tmp_path: Path, rank: int, code: int
) -> None:
    (tmp_path / "site.toml").write_text(
        f"superlink = 'localhost:9092'\nport = 9094\n[node]\nname = 'oslo'\nrank = {rank}\n"
        f"data-path = '{data}'\nmodel-path = '{llama_folder}'\ndevice = 'cpu'\n"
    )
    command = ["check", str(tmp_path), "--offline", "--set", "data.context=48"]
    said = CliRunner(env={"COLUMNS": "200"}).invoke(cli, command)
    assert said.exit_code == code, said.output
    assert ("oslo can join" in said.output) == (code == 0)
    assert ("1 to mend before oslo can take part" in said.output) == (code == 1)
