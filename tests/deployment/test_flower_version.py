"""Under a Flower whose nodes speak HTTP: what a deployment refuses, and what goes on."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deployment.folder import create_deployment
from deployment.plan import Plan
from tools.rehearsal.loopback import ROOT

NEWER = "1.42.0"
PORT = 9092


@pytest.fixture
def newer(tmp_path: Path) -> dict[str, str]:
    """An environment in which Flower says that it is a newer version."""
    metadata = tmp_path / "newer" / f"flwr-{NEWER}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: flwr\nVersion: {NEWER}\n")
    path = f"{metadata.parents[1]}{os.pathsep}{ROOT}"
    return {**os.environ, "PYTHONPATH": path, "NO_COLOR": "1", "COLUMNS": "400"}


def bouquet(environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "bouquet", *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, ended.stdout + ended.stderr


def secure_site(folder: Path) -> Path:
    plan = Plan("trial", "localhost", fleet_port=PORT)
    create_deployment(folder / "trial", plan, ["oslo"], sites_make_keys=False)
    return folder / "trial" / "sites" / "oslo"


def test_no_deployment_with_keys_begins(newer: dict[str, str], tmp_path: Path) -> None:
    where = ["--address", "fed.example.org", "--sites", "oslo"]
    code, said = bouquet(newer, "deploy", "init", str(tmp_path / "trial"), *where)
    assert code != 0
    assert f"Flower {NEWER} is installed" in said
    assert "needs Flower 1.39" in said
    assert not (tmp_path / "trial").exists()


def test_one_that_was_made_before_does_not_start(newer: dict[str, str], tmp_path: Path) -> None:
    site = secure_site(tmp_path)
    script = (tmp_path / "trial" / "coordinator" / "start-superlink.sh").read_text()
    assert script.index("bouquet deploy needs-grpc") < script.index("exec flower-superlink")
    for arguments in (["needs-grpc"], ["site-settings", str(site)]):
        code, said = bouquet(newer, "deploy", *arguments)
        assert code != 0, arguments
        assert "needs Flower 1.39" in said, arguments
    code, said = bouquet(newer, "check", str(site))
    assert code == 1
    assert f"mend  Flower      Flower {NEWER} is installed" in said


def test_the_insecure_form_uses_the_port_that_nodes_have(
    newer: dict[str, str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        folder = tmp_path / "here"
        where = ["--address", "127.0.0.1", "--sites", "one", "--control-port", str(port)]
        code, said = bouquet(newer, "deploy", "init", str(folder), *where, "--insecure")
        assert code == 0, said
        site = folder / "sites" / "one"
        code, said = bouquet(newer, "deploy", "site-settings", str(site))
        assert said.splitlines()[0] == f"127.0.0.1:{port}"
        _, said = bouquet(newer, "check", str(site))
        assert f"note  SuperLink   something listens at 127.0.0.1:{port}" in said
        assert f"Flower {NEWER} speaks HTTP and this check gRPC" in said
    _, said = bouquet(newer, "check", str(site))
    assert f"mend  SuperLink   no connection to 127.0.0.1:{port}" in said


def test_the_pinned_flower_speaks_grpc(tmp_path: Path) -> None:
    assert f'superlink = "localhost:{PORT}"' in (secure_site(tmp_path) / "site.toml").read_text()
    assert bouquet(dict(os.environ, PYTHONPATH=str(ROOT)), "deploy", "needs-grpc") == (0, "")
