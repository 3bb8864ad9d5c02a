"""bouquet check in the coordinator's folder: every line, right and wrong."""

import datetime
import socket
import sqlite3
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from commands.cli import cli
from deployment.certificates import Certificate, issue_server
from deployment.coordinator_checks import check_coordinator
from deployment.findings import Verdict
from deployment.folder import create_deployment
from deployment.plan import Plan


def free_port() -> int:
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        return int(here.getsockname()[1])


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    plan = Plan("trial", "fed.example.org", fleet_port=free_port(), control_port=free_port())
    create_deployment(tmp_path / "trial", plan, ["oslo"], sites_make_keys=False)
    return tmp_path / "trial"


def found(folder: Path) -> dict[str, tuple[Verdict, str]]:
    return {each.subject: (each.verdict, each.sentence) for each in check_coordinator(folder)}


def test_a_new_folder_is_ready(trial: Path) -> None:
    told = found(trial / "coordinator")
    wrong = {name for name, (verdict, _) in told.items() if verdict is Verdict.MEND}
    assert wrong == set()
    assert told["certificate"][1].startswith("for fed.example.org, localhost, 127.0.0.1; 39")
    assert told["database"][1] == "none yet: the SuperLink makes it"
    assert told["sites"] == (
        Verdict.NOTE,
        "not registered: oslo. ./register-sites.sh does it",
    )
    said = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["check", str(trial / "coordinator")])
    assert (said.exit_code, "the coordinator is ready" in said.output) == (0, True)


def test_what_is_wrong_is_to_be_mended(trial: Path) -> None:
    coordinator = trial / "coordinator"
    (coordinator / "server.key").chmod(0o644)
    (coordinator / "ca.key").write_bytes((trial / "authority" / "ca.key").read_bytes())
    (coordinator / "superlink.db").write_bytes(b"no database" * 1000)
    told = found(coordinator)
    assert told["server.key"][0] is Verdict.MEND
    assert told["ca.key"][0] is Verdict.NOTE
    assert told["database"][0] is Verdict.MEND
    said = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["check", str(coordinator)])
    assert said.exit_code == 1
    assert "chmod 600" in said.output


def test_a_certificate_of_another_authority_or_key(trial: Path) -> None:
    coordinator = trial / "coordinator"
    authority = Certificate(
        (trial / "authority" / "ca.pem").read_bytes(), (trial / "authority" / "ca.key").read_bytes()
    )
    (coordinator / "server.pem").write_bytes(issue_server(authority, ["localhost"]).certificate)
    verdict, words = found(coordinator)["certificate"]
    assert (verdict, words) == (
        Verdict.MEND,
        "server.key is not that of server.pem: bouquet deploy renew",
    )
    (coordinator / "server.pem").write_text("nothing")
    assert found(coordinator)["certificate"][0] is Verdict.MEND


def test_a_certificate_that_names_nobody(trial: Path) -> None:
    coordinator = trial / "coordinator"
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fed")])
    now = datetime.datetime.now(datetime.UTC)
    bare = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=9))
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )
    for file in ("server.pem", "ca.pem"):
        (coordinator / file).write_bytes(bare)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (coordinator / "server.key").write_bytes(pem)
    verdict, words = found(coordinator)["certificate"]
    assert (verdict, "names no host" in words) == (Verdict.MEND, True)


def test_a_port_that_is_taken_where_the_authority_is_lost(trial: Path) -> None:
    coordinator = trial / "coordinator"
    (coordinator / "ca.pem").unlink()
    script = (coordinator / "start-superlink.sh").read_text()
    port = int(script.split("--host 127.0.0.1 --port ")[1].split()[0])
    with socket.create_server(("127.0.0.1", port)):
        verdict, words = found(coordinator)["own port"]
    assert (verdict, "no SuperLink of this folder" in words) == (Verdict.MEND, True)


def test_a_database_and_a_port_that_is_taken(trial: Path) -> None:
    coordinator = trial / "coordinator"
    with sqlite3.connect(coordinator / "superlink.db") as database:
        database.execute("PRAGMA journal_mode=wal")
        database.execute("CREATE TABLE x (y)")
    assert found(coordinator)["database"][1].endswith(", WAL")
    script = (coordinator / "start-superlink.sh").read_text()
    port = int(script.split("--host 127.0.0.1 --port ")[1].split()[0])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        taken.settimeout(0.1)
        assert found(coordinator)["own port"][0] is Verdict.MEND
