"""One federation from nothing to the removal of a site, as docs/deploy.md tells it.

Real SuperLink with TLS and node authentication, three real SuperNodes of ranks 8, 4 and 2, two
rounds on a tiny model; in round one a client is killed while it trains.
"""

import json
import shutil
import sqlite3
import zipfile
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from safetensors.numpy import load_file

from client.app import app as client_app
from deployment.connection_checks import check_connection
from deployment.findings import Verdict
from deployment.site_file import read_site
from deployment.trial import rooms_of_the_bundle
from journal.state import load_state
from server.app import app as server_app
from settings.keys import Value, flatten, flatten_tables
from settings.run import run_settings
from simulations.grid import RUN_ID, SERVER_NODE, InProcessGrid
from tests.deployment.federation import RANKS, Federation
from tests.deployment.page import ALONE, Step, steps
from tools.rehearsal.loopback import is_free

KILLED = "tromso"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """After the last step of the page but those for one machine alone."""
    federation = Federation(tmp_path_factory.mktemp("federation"))
    try:
        for step in steps():
            if "flwr run" in step.text:
                play_the_run(federation, step)
            elif step.machines not in ALONE:
                federation.play(step)
        yield federation
    finally:
        federation.loopback.stop()


def play_the_run(federation: Federation, step: Step) -> None:
    """In the background; meanwhile one client dies in training and a stranger knocks."""
    federation.played.append(step)
    loopback, folder = federation.loopback, federation.machines["coordinator"]
    before, command = step.text.strip().rsplit("\n", 1)
    federation.outputs.append(loopback.run(before, folder))
    loopback.start("run", command, folder)
    loopback.kill_task_of(KILLED, "Receiving: train message")
    knock(federation)
    assert loopback.wait_for_end("run") == 0, loopback.all_logs()
    assert federation.run_folder.is_dir(), loopback.all_logs()


def knock(federation: Federation) -> None:
    """A SuperNode with oslo's folder but a key of its own, which nobody registered."""
    stranger = federation.loopback.folder / "stranger"
    shutil.copytree(federation.machines["oslo"] / "oslo", stranger)
    for file in stranger.glob("node.key*"):
        file.unlink()
    toml = next(step for step in federation.played if step.machines == ("site.toml",))
    federation.write_site(toml, "stranger", stranger)
    federation.loopback.run(f"bouquet deploy key {stranger}", stranger)
    federation.loopback.start("stranger", str(stranger / "start-supernode.sh"), stranger)
    federation.loopback.wait_for_end("stranger")


def records(federation: Federation) -> list[dict[str, Any]]:
    log = federation.run_folder / "rounds.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_every_block_of_the_page_was_played(federation: Federation) -> None:
    assert federation.played == [step for step in steps() if step.machines not in ALONE]
    assert all(step.machines for step in steps()), "a block of the page names no machine"
    registered = [
        line for line in "".join(federation.outputs).splitlines() if ": registered as" in line
    ]
    assert [line.partition(":")[0] for line in registered] == ["bergen", "oslo", "tromso"]


def test_the_round_goes_on_without_the_killed_client(federation: Federation) -> None:
    _, first, second = records(federation)
    assert [client["client"] for client in first["clients"]] == ["bergen", "oslo"]
    assert [failure["client"] for failure in first["failures"]] == [KILLED]
    assert "ClientApp" in first["failures"][0]["reason"]
    assert {c["client"]: c["rank"] for c in second["clients"]} == RANKS
    assert second["failures"] == []


def test_the_adapter_is_that_of_a_simulation_of_the_same_participants(
    federation: Federation, tmp_path: Path
) -> None:
    failed = {
        (record["round"], failure["client"])
        for record in records(federation)
        for failure in record.get("failures", [])
    }
    simulate(federation, tmp_path / "run", failed)
    assert config_of(tmp_path / "run") == config_of(federation.run_folder)  # so the same scales
    ours, theirs = products(tmp_path / "run"), products(federation.run_folder)
    assert ours.keys() == theirs.keys()
    for name in ours:
        distance = np.linalg.norm(theirs[name] - ours[name])
        assert distance <= 1e-5 * np.linalg.norm(ours[name]), name


def config_of(run: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((run / "adapter" / "adapter_config.json").read_text())
    return config


def products(run: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Module -> B A of a run's adapter; its factors alone are unique only up to signs."""
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    return {
        name: tensors[name.replace(".lora_A.", ".lora_B.")].astype(np.float64) @ a
        for name, a in tensors.items()
        if ".lora_A." in name
    }


def simulate(federation: Federation, output: Path, failed: set[tuple[int, str]]) -> None:
    """The same run in this process, with the same clients failing in the same rounds."""
    names = sorted(RANKS)

    def answer(message: Message, context: Context) -> Message:
        instruction = message.content.get("instruction", {})
        asked = (instruction.get("round"), context.node_config["name"])
        if message.metadata.message_type == "train" and asked in failed:
            raise RuntimeError("killed")
        return client_app(message, context)

    where: dict[str, Value] = {"output": str(output), "resume": False}
    settings = run_settings(flatten_tables(federation.run_config), where)
    configs: list[dict[str, Value]] = [
        {
            "name": name,
            "rank": RANKS[name],
            "data-path": str(federation.data[name]),
            "model-path": str(federation.model),
            "device": "cpu",
            "cache-path": str(output.parent / "caches" / name),
        }
        for name in names
    ]
    run_config = flatten(settings)
    grid = InProcessGrid(answer, len(names), run_config, node_configs=configs)  # type: ignore[arg-type]
    server_app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), dict(run_config)))


def test_an_unregistered_key_is_refused(federation: Federation) -> None:
    log = federation.loopback.log("stranger")
    assert "Exit Code: 305" in log
    assert "SuperNode ID" not in log
    assert unknown_key(federation.loopback.folder / "stranger")


def test_status_tells_who_failed_and_why(federation: Federation) -> None:
    said = next(output for output in federation.outputs if "round 2 of 2 is done" in output)
    assert f"round 1: {KILLED} failed: the client failed" in said
    assert "the adapter is in" in said


def test_what_was_backed_up_while_it_ran_can_be_restored(federation: Federation) -> None:
    restored = federation.project / "restored" / "trial" / "coordinator"
    told = [output for output in federation.outputs if "round 2 of 2 is done" in output]
    assert any("restored/trial" in output for output in told)
    assert load_state(restored / "runs" / "trial" / "state").round == 2
    with closing(sqlite3.connect(restored / "superlink.db")) as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
        tables = database.execute("select count(*) from sqlite_master").fetchone()
    assert tables > (0,)
    assert not (restored / "superlink.db-wal").exists()


def test_checks_of_the_sites_passed(federation: Federation) -> None:
    said = [output for output in federation.outputs if "can join" in output]
    assert len(said) == 2
    for output in said:
        assert "mend" not in output
        assert "answers and knows this site's key" in output


def test_a_removed_site_is_refused(federation: Federation) -> None:
    assert any("tromso: removed" in output for output in federation.outputs)
    assert unknown_key(federation.machines["tromso"] / "tromso")
    assert not unknown_key(federation.machines["oslo"] / "oslo")


def unknown_key(site: Path) -> bool:
    """Whether a check of this site says that the SuperLink does not know it."""
    found = {finding.subject: finding for finding in check_connection(read_site(site))}
    assert found["clock"].verdict is Verdict.OK
    assert found["certificate"].verdict is Verdict.OK
    refused = found["SuperLink"].verdict is Verdict.MEND
    assert refused == ("does not know this key" in found["SuperLink"].sentence)
    return refused


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_no_secret_is_in_the_bundle_though_the_deployment_lies_in_the_project(
    federation: Federation,
) -> None:
    (federation.project / "private.jsonl").write_text('{"secret": 1}\n')
    (federation.project / "trial" / "coordinator" / "notes.md").write_text("secret")
    bundle = zipfile.ZipFile(BytesIO(build_fab_from_disk(federation.project)))
    roots = {name.partition("/")[0] for name in bundle.namelist()}
    rooms = {*rooms_of_the_bundle()}
    assert roots == rooms | {"pyproject.toml", "LICENSE", ".info"}
    assert not [n for n in bundle.namelist() if n.partition("/")[0] in rooms and n[-3:] != ".py"]


def test_nothing_is_left_behind(federation: Federation) -> None:
    federation.loopback.stop()
    assert federation.loopback.alive() == []
    for port in (federation.fleet_port, federation.control_port, *federation.ports.values()):
        assert is_free(port), port
    assert not (federation.loopback.home / ".flwr").exists()
