"""The insecure form of docs/deploy.md: it says what it is, and a SuperNode joins."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deployment.connection_checks import check_connection
from deployment.findings import Verdict
from deployment.site_file import read_site
from tests.deployment.page import steps
from tools.rehearsal.loopback import Loopback, free_ports, is_free


@pytest.fixture
def loopback(tmp_path: Path) -> Iterator[Loopback]:
    fleet, control = free_ports(2)
    ports = {"BOUQUET_FLEET_PORT": str(fleet), "BOUQUET_CONTROL_PORT": str(control)}
    loopback = Loopback(tmp_path, **ports)
    try:
        yield loopback
    finally:
        loopback.stop()
    assert is_free(fleet)
    assert is_free(control)


def test_the_laptop_of_the_page(loopback: Loopback) -> None:
    folder = loopback.folder
    written, superlink, supernode = [step for step in steps() if step.machines == ("laptop",)]
    said = loopback.run(written.text, folder)
    assert "INSECURE: no TLS, no keys; for trying out on one machine only" in said
    assert not list(folder.rglob("*.key"))
    assert not list(folder.rglob("*.pem"))
    loopback.start("superlink", superlink.text.strip(), folder)
    loopback.wait_for("superlink", "Uvicorn running")
    toml = folder / "plain" / "sites" / "one" / "site.toml"
    toml.write_text(toml.read_text().replace("port = 9094", f"port = {free_ports(1)[0]}"))
    loopback.start("supernode", supernode.text.strip(), folder)
    loopback.wait_for("supernode", "SuperNode ID")
    for name in ("superlink", "supernode"):
        assert loopback.log(name).startswith("INSECURE: no TLS, no keys.")
    found = {finding.subject: finding for finding in check_connection(read_site(toml.parent))}
    assert found["key"].verdict is Verdict.NOTE
    assert found["SuperLink"].verdict is Verdict.OK
    assert found["clock"].verdict is Verdict.OK
