"""Sites whose owners have changed Flower in their own environment, among two honest ones.

Real SuperLink, TLS, keys and SuperNodes. One site cannot be understood when it is asked who it is,
one sends something else that is wrong in every round's training, one in every evaluation, and one
is honest but for its name. The run ends with the bytes of a run in one process in which these
answers failed.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from settings.keys import Value
from tests.deployment.hostile_client import PLANS, SITES, environment
from tools.rehearsal.loopback import is_free
from tools.rehearsal.small_federation import LINK, SmallFederation
from tools.soak_checks import asked, failed, fingerprint, played, records

RANKS: dict[str, dict[str, Value]] = {
    "oslo": {"rank": 4},
    "bergen": {"rank": 2},
    **{name: {"rank": 3} for name in SITES},
}
BROKEN = "cannot be read"
ROUNDS = len(PLANS["at-train"]["train"])
CONFIG: dict[str, Any] = {
    "output": "runs/hostile",
    "resume": True,
    "rounds": ROUNDS,
    "seed": 5,
    "strategy": {"name": "flora"},
    "clients": {"min-replies": 2, "timeout-seconds": 60.0},
    "evaluate": {"server": False, "clients": True},
}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallFederation]:
    """After its run."""
    federation = SmallFederation(
        tmp_path_factory.mktemp("hostile"),
        "server.app:app",
        "tools.rehearsal.quick_client:app",
        RANKS,
        prefixes={name: environment(name) for name in SITES},
    )
    try:
        federation.start()
        federation.start_run("run", CONFIG)
        federation.loopback.wait_for_end("run", 600.0)  # a minute of it waits for a silent site
        yield federation
    finally:
        federation.loopback.stop()
    assert all(is_free(port) for port in federation.ports)


def run_folder(federation: SmallFederation) -> Path:
    return federation.coordinator / "runs" / "hostile"


def test_the_sites_were_hostile(federation: SmallFederation) -> None:
    for name, plan in PLANS.items():
        for mischief in next(iter(plan.values())):
            assert f"hostile: {mischief.__name__}" in federation.loopback.log(name)


def test_the_run_ends_with_the_honest_sites_bytes(
    federation: SmallFederation, tmp_path: Path
) -> None:
    run = run_folder(federation)
    assert (run / "adapter" / "adapter_model.safetensors").exists(), federation.loopback.all_logs()
    lost = [(number, name) for number, name in failed(run) if name != "at-query"]
    assert lost == [(number, "at-train") for number in range(1, ROUNDS + 1)]
    there = ["as-oslo", "at-evaluate", "at-train", "bergen", "oslo"]
    assert asked(run) == [there] * ROUNDS
    told = {
        "config": CONFIG,
        "sites": {name: RANKS[name] for name in there},
        "asked": asked(run),
        "failed": lost,
    }
    reference = played(tmp_path / "replay", told, federation.loopback)
    assert fingerprint(run) == fingerprint(reference)


def test_who_sent_what_is_told_by_name(federation: SmallFederation) -> None:
    reasons = {
        record["round"]: failure["reason"]
        for record in records(run_folder(federation))[1:]
        for failure in record["failures"]
        if failure["client"] == "at-train"
    }
    assert BROKEN in reasons[1]
    assert "bytes" in reasons[2]
    assert "not asked for" in reasons[3]
    assert "bytes" in reasons[4]
    assert "chunks where 2 are enough" in reasons[5]
    assert reasons[6] == "no reply within 60 s"
    assert max(map(len, reasons.values())) < 1000
    log = federation.loopback.log("run")
    assert "client=at-evaluate" in log
    (node,) = re.findall(r"SuperNode ID: (\d+)", federation.loopback.log("at-query"))
    left_out = [line for line in log.splitlines() if "event=left-out" in line]
    assert len(left_out) == 1, log
    assert BROKEN in left_out[0], log
    assert node in left_out[0] or "at-query" in left_out[0], "by its name, or Flower's number"


def test_who_calls_itself_by_anothers_name_runs_under_its_own(
    federation: SmallFederation,
) -> None:
    log = federation.loopback.log("run")
    assert re.search(r"event=another-name node=\d+ registered=as-oslo claims=oslo", log), log
    for record in records(run_folder(federation))[1:]:
        assert "as-oslo" in {client["client"] for client in record["clients"]}


def test_a_removed_site_does_not_come_back(federation: SmallFederation) -> None:
    federation.loopback.run(f"{federation.coordinator}/remove-site.sh at-train", federation.project)
    federation.loopback.kill("at-train")
    federation.start_sites(["at-train"], wait=False)
    assert federation.loopback.wait_for_end("at-train") != 0
    assert federation.count("at-train", "SuperNode ID") == 1
    key = federation.site("at-train") / "node.key.pub"
    again = f"bouquet deploy add-site trial at-train --public-key {key}"
    told = federation.loopback.run(again.replace("trial", LINK, 1), federation.project, code=2)
    assert "The site makes a new key" in told


def test_a_key_that_was_replaced_trains_no_more(federation: SmallFederation) -> None:
    old = federation.site("bergen")
    moved = federation.project / "bergen-before"
    shutil.copytree(old, moved, ignore=shutil.ignore_patterns("cache", "flower"))
    # As where `init` ran on another machine, which has the public keys and no number of a node.
    office, keys = federation.project / "office", federation.coordinator / "keys"
    leaves_out = shutil.ignore_patterns("*.node", "*.db*", "flower", "runs")
    shutil.copytree(federation.coordinator.parent, office, ignore=leaves_out)
    federation.loopback.run(
        f"rm {old}/node.key {old}/node.key.pub && bouquet deploy key {old} && "
        f"bouquet deploy add-site office bergen --public-key {old}/node.key.pub && "
        f"cp -r office/coordinator/keys/. {keys}",
        federation.project,
    )
    federation.loopback.kill("bergen")
    said = federation.loopback.run(
        str(federation.coordinator / "register-sites.sh"), federation.project
    )
    revoked, registered = said.index("bergen: the key of node"), said.index("bergen: registered as")
    assert revoked < registered
    federation.loopback.start("before", str(moved / "start-supernode.sh"), federation.project)
    assert federation.loopback.wait_for_end("before") != 0
    assert federation.count("before", "SuperNode ID") == 0
    federation.start_sites(["bergen"])
    said = federation.loopback.run(
        f"{federation.coordinator}/remove-site.sh bergen", federation.project
    )
    assert len(re.findall(r"bergen: the SuperLink has node \d+ as unregistered", said)) == 2
    assert "oslo (online)" in said
