"""What init writes: who may read it, where each secret is, and what it refuses."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from typer.testing import CliRunner

from commands.cli import cli
from core.errors import UsageError
from deployment.folder import add_site, create_deployment, pack_site, renew_server
from deployment.node_keys import check_public_key, make_node_key, read_node_key
from deployment.plan import Plan, read_plan, site_names

SITES = ["oslo", "bergen"]


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    folder = tmp_path / "trial"
    create_deployment(folder, Plan("trial", "fed.example.org"), SITES, sites_make_keys=False)
    return folder


def secrets(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and b"PRIVATE KEY" in path.read_bytes()
    }


def test_each_secret_is_in_one_place_and_for_its_owner_only(trial: Path) -> None:
    assert secrets(trial) == {
        "authority/ca.key",
        "coordinator/server.key",
        "sites/oslo/node.key",
        "sites/bergen/node.key",
    }
    for name in secrets(trial):
        assert stat.S_IMODE((trial / name).stat().st_mode) == 0o600, name
    assert "*\n" in (trial / ".gitignore").read_text()


def test_a_site_gets_nothing_of_another_or_of_the_coordinator(trial: Path) -> None:
    ours = (trial / "sites" / "oslo" / "node.key.pub").read_bytes()
    assert ours == (trial / "coordinator" / "keys" / "oslo.pub").read_bytes()
    for path in (trial / "sites" / "oslo").rglob("*"):
        if path.is_file():
            assert "bergen" not in path.read_text(), path
            assert str(trial) not in path.read_text(), path


def test_keys_belong_together_and_flower_takes_them(trial: Path) -> None:
    site = trial / "sites" / "oslo"
    public = load_ssh_public_key((site / "node.key.pub").read_bytes())
    assert read_node_key(site / "node.key").public_key() == public
    assert read_node_key(site / "node.key").curve.name == "secp384r1"


@pytest.mark.parametrize("insecure", [False, True])
def test_scripts_are_plain_sh_and_every_placeholder_is_filled(
    tmp_path: Path, insecure: bool
) -> None:
    folder = tmp_path / "trial"
    plan = Plan("trial", "localhost", insecure=insecure)
    create_deployment(folder, plan, SITES, sites_make_keys=False)
    scripts = sorted(folder.rglob("*.sh"))
    assert len(scripts) == (6 if insecure else 8)
    for script in scripts:
        subprocess.run(["sh", "-n", str(script)], check=True)
        assert os.access(script, os.X_OK) == script.read_text().startswith("#!")
        assert ("INSECURE" in script.read_text()) == (insecure and "start-" in script.name)
    for path in folder.rglob("*"):
        if path.is_file():
            assert not re.search(rb"@[A-Z_]+@", path.read_bytes()), path


def test_the_operators_port_is_on_the_loopback_interface_only(trial: Path) -> None:
    script = (trial / "coordinator" / "start-superlink.sh").read_text()
    assert "--host 127.0.0.1 --port 8000" in script
    assert "--enable-supernode-auth" in script
    assert "--disable-runtime-dependency-installation" in script


def test_nothing_is_overwritten(trial: Path) -> None:
    plan = read_plan(trial)
    with pytest.raises(UsageError, match=r"exists already\. Add a site"):
        create_deployment(trial, plan, [], sites_make_keys=False)
    with pytest.raises(UsageError, match="exists already: choose another name"):
        add_site(trial, plan, "oslo")
    with pytest.raises(UsageError, match="To make a new one, move it away first"):
        make_node_key(trial / "sites" / "oslo" / "node.key", "oslo")


def test_a_site_may_make_its_own_key(trial: Path, tmp_path: Path) -> None:
    plan = read_plan(trial)
    site, _ = add_site(trial, plan, "tromso", makes_own_key=True)
    assert secrets(site) == set()
    assert not (trial / "coordinator" / "keys" / "tromso.pub").exists()
    public = make_node_key(tmp_path / "node.key", "tromso")
    add_site(trial, plan, "tromso", public_key=public)
    assert (trial / "coordinator" / "keys" / "tromso.pub").read_bytes() == public.read_bytes()
    assert secrets(site) == set()


def test_a_private_key_is_no_public_key(trial: Path, tmp_path: Path) -> None:
    make_node_key(tmp_path / "node.key", "tromso")
    with pytest.raises(UsageError, match="holds a private key, which belongs to the site alone"):
        add_site(trial, read_plan(trial), "tromso", public_key=tmp_path / "node.key")
    assert not (trial / "sites" / "tromso").exists()
    (tmp_path / "odd.pub").write_text("ssh-ed25519 AAAA")
    with pytest.raises(UsageError, match="is not a public key in OpenSSH's format"):
        check_public_key(tmp_path / "odd.pub")


def test_a_renewal_keeps_the_authority_and_may_add_a_name(trial: Path) -> None:
    coordinator = trial / "coordinator"
    before = {name: (coordinator / name).read_bytes() for name in ("ca.pem", "server.pem")}
    renew_server(trial, read_plan(trial), ["10.0.0.7"])
    assert (coordinator / "ca.pem").read_bytes() == before["ca.pem"]
    assert (coordinator / "server.pem").read_bytes() != before["server.pem"]
    assert read_plan(trial).other_addresses == ("10.0.0.7",)
    (trial / "authority" / "ca.key").unlink()
    with pytest.raises(UsageError, match="Bring the authority folder back"):
        renew_server(trial, read_plan(trial))


def test_without_tls_only_on_this_machine() -> None:
    with pytest.raises(UsageError, match="it is for one machine, --address localhost"):
        Plan("trial", "fed.example.org", insecure=True)


@pytest.mark.parametrize("odd", ["Oslo", "oslo bergen", "../oslo", "", "-oslo", "oslo/x"])
def test_a_site_is_named_as_a_folder_can_be(trial: Path, odd: str) -> None:
    with pytest.raises(UsageError, match="is no name for a site"):
        add_site(trial, read_plan(trial), odd)


def test_each_site_once() -> None:
    assert site_names("oslo, bergen,") == SITES
    with pytest.raises(UsageError, match="names one site twice"):
        site_names("oslo,oslo")


def test_a_folder_without_a_plan_is_no_deployment(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no deployment: it has no deployment"):
        read_plan(tmp_path)


def test_no_file_names_the_folder_that_it_was_made_in(trial: Path) -> None:
    for path in trial.rglob("*"):
        if path.is_file():
            assert str(trial) not in path.read_text(), path
            assert sys.prefix not in path.read_text(), path


def test_a_site_is_packed_for_its_owner_only(trial: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("rounds = 2\n")
    path = pack_site(trial, "oslo", tmp_path / "run.toml", tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with tarfile.open(path) as archive:
        names = archive.getnames()
        assert {entry.uname for entry in archive.getmembers()} == {""}
    assert {"run.toml", "oslo", "oslo/node.key", "oslo/ca.pem", "oslo/site.toml"} <= set(names)
    assert all(name == "run.toml" or name.startswith("oslo") for name in names)
    with pytest.raises(UsageError, match=r"has no site 'narvik'; it has bergen, oslo"):
        pack_site(trial, "narvik", None, tmp_path)
    said = CliRunner().invoke(
        cli, ["deploy", "pack", str(trial), "bergen", "--into", str(tmp_path)]
    )
    assert said.exit_code == 0
    assert "sites/bergen/node.key here" in said.output.replace("\n", "")


@pytest.mark.parametrize(
    ("address", "others", "denies"),
    [
        ("192.0.2.7", (), True),
        ("192.0.2.7", ("192.0.2.8",), True),
        ("fed.example.org", ("192.0.2.7",), False),  # which may resolve to anything
        ("192.0.2.7", ("fed.example.org",), False),
    ],
)
def test_a_site_is_not_kept_from_its_own_coordinator(
    tmp_path: Path, address: str, others: tuple[str, ...], denies: bool
) -> None:
    plan = Plan("trial", address, other_addresses=others)
    create_deployment(tmp_path / "trial", plan, ["oslo"], sites_make_keys=False)
    unit = (tmp_path / "trial" / "sites" / "oslo" / "supernode.service").read_text()
    assert ("\nIPAddressDeny=any\n" in unit) == denies
    if denies:
        assert f"IPAddressAllow=localhost {' '.join((address, *others))}\n" in unit


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("unit", ["coordinator/superlink.service", "sites/oslo/supernode.service"])
def test_units_are_hardened(tmp_path: Path, unit: str) -> None:
    folder = tmp_path / "trial"
    plan = Plan("trial", "192.0.2.7", allow=("198.51.100.0/24",), install="/opt/fed")
    create_deployment(folder, plan, SITES, sites_make_keys=False)
    text = (folder / unit).read_text()
    assert "MemoryMax=" in text
    assert "\nIPAddressDeny=any\n" in text
    assert "/opt/fed/" in text
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(folder / unit)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for .*: ([0-9.]+)", said.stdout)
    assert found, said.stderr
    assert float(found[1]) < 4.0
