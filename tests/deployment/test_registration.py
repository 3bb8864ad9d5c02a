"""Whose key counts: the one in force, and never again one that was revoked.

Here Flower's command is played by one that keeps what a SuperLink keeps; test_removed_keys.py asks
a real one.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from core.errors import BouquetError, UsageError
from deployment.folder import add_site, create_deployment
from deployment.node_keys import fingerprint, make_node_key
from deployment.plan import Plan, read_plan
from deployment.registration import GONE, Flower, Keys, register_sites, remove_site


class Link(Flower):
    """Keys that were ever registered, as a SuperLink remembers them."""

    def __init__(self) -> None:
        super().__init__("trial")
        self.ever: dict[bytes, int] = {}
        self.status: dict[int, str] = {}
        self.asked: list[str] = []

    def nodes(self) -> dict[int, str]:
        return dict(self.status)

    def register(self, key: Path, name: str) -> int:
        self.asked.append(f"register {name}")
        if key.read_bytes() in self.ever:
            raise BouquetError("Public key already in use")
        node = self.ever[key.read_bytes()] = 100 + len(self.ever)
        self.status[node] = "registered"
        return node

    def unregister(self, node: int) -> None:
        self.asked.append(f"unregister {node}")
        self.status[node] = GONE


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    folder = tmp_path / "trial"
    create_deployment(folder, Plan("trial", "fed.example.org"), ["bergen", "oslo"], False)
    return folder


@pytest.fixture
def keys(trial: Path) -> Keys:
    return Keys(trial / "coordinator" / "keys")


def registered(keys: Keys, link: Link) -> tuple[bool, list[str]]:
    said: list[str] = []
    return register_sites(keys, link, said.append), said


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
def test_the_fingerprint_is_the_one_that_openssh_prints(keys: Keys) -> None:
    key = keys.key("oslo")
    done = subprocess.run(
        ["ssh-keygen", "-lf", str(key)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[1] == fingerprint(key)


def test_each_key_is_registered_once(keys: Keys) -> None:
    link = Link()
    assert registered(keys, link) == (
        True,
        ["bergen: registered as node 100", "oslo: registered as node 101"],
    )
    assert registered(keys, link)[1] == [
        "bergen: registered before, as node 100",
        "oslo: registered before, as node 101",
    ]
    number, owner = (keys.folder / "oslo.node").read_text().splitlines()
    assert (number, owner) == ("101", fingerprint(keys.key("oslo")))


def test_a_new_key_revokes_the_old_one_first(trial: Path, keys: Keys, tmp_path: Path) -> None:
    link = Link()
    registered(keys, link)
    new = make_node_key(tmp_path / "node.key", "oslo")
    _, replaced = add_site(trial, read_plan(trial), "oslo", public_key=new)
    assert replaced
    link.asked.clear()
    assert registered(keys, link)[0]
    assert link.asked == ["unregister 101", "register oslo"]
    assert (keys.node("oslo"), link.status[101]) == (102, GONE)
    assert list(keys.revoked_nodes("oslo")) == [("oslo", 101)]


@pytest.mark.parametrize("carries_revoked", [True, False])
def test_a_key_replaced_on_the_machine_of_init_revokes_the_old_one(
    trial: Path, keys: Keys, tmp_path: Path, carries_revoked: bool
) -> None:
    """There no number is kept: the coordinator gets keys/ with another NAME.pub, as by rsync."""
    link = Link()
    office = tmp_path / "office"
    shutil.copytree(trial, office)
    registered(keys, link)
    new = make_node_key(tmp_path / "node.key", "oslo")
    add_site(office, read_plan(office), "oslo", public_key=new)
    came = office / "coordinator" / "keys"
    if not carries_revoked:
        shutil.rmtree(came / "revoked")
    shutil.copytree(came, keys.folder, dirs_exist_ok=True)
    link.asked.clear()
    went_well, said = registered(keys, link)
    assert went_well
    assert link.asked == ["unregister 101", "register oslo"]
    assert "oslo: has another key than the one that was registered" in said
    assert (keys.node("oslo"), link.status[101]) == (102, GONE)
    assert list(keys.revoked_nodes("oslo")) == [("oslo", 101)]
    assert registered(keys, link)[1][-1] == "oslo: registered before, as node 102"
    # The old one does not come back by a copy of an old folder, nor does that end the new one.
    shutil.copy(trial / "sites" / "oslo" / "node.key.pub", keys.key("oslo"))
    went_well, said = registered(keys, link)
    assert not went_well
    assert said[-1].startswith("oslo: REFUSED. oslo: oslo.pub was revoked")
    assert link.status[102] == "registered"


def test_removal_after_a_replacement_elsewhere_takes_both_keys(keys: Keys, tmp_path: Path) -> None:
    link, said = Link(), list[str]()
    registered(keys, link)
    shutil.copy(make_node_key(tmp_path / "node.key", "oslo"), keys.key("oslo"))
    assert remove_site(keys, link, "oslo", said.append)
    assert link.status == {100: "registered", 101: GONE}
    assert keys.names() == ["bergen"]


def test_removal_takes_every_key_a_site_ever_had(trial: Path, keys: Keys, tmp_path: Path) -> None:
    link, said = Link(), list[str]()
    registered(keys, link)
    add_site(trial, read_plan(trial), "oslo", public_key=make_node_key(tmp_path / "k", "oslo"))
    # It was never told of the new key: the old one is still in force there.
    remove_site(keys, link, "oslo", said.append)
    assert link.status == {100: "registered", 101: GONE}
    assert said[-2:] == [
        "oslo: the SuperLink has node 101 as unregistered",
        "oslo: removed, with every key it had. May join: bergen (registered)",
    ]
    assert keys.names() == ["bergen"]
    with pytest.raises(UsageError, match="there is no site 'narvik'"):
        remove_site(keys, link, "narvik", said.append)


def test_a_revoked_key_that_comes_again_is_refused(trial: Path, keys: Keys, tmp_path: Path) -> None:
    link = Link()
    registered(keys, link)
    old = tmp_path / "node.key.pub"
    old.write_bytes(keys.key("oslo").read_bytes())
    remove_site(keys, link, "oslo", lambda line: None)
    with pytest.raises(UsageError, match=r"was revoked .* The site makes a new key"):
        add_site(trial, read_plan(trial), "oslo", public_key=old)
    keys.key("oslo").write_bytes(b" ".join(old.read_bytes().split()[:2]) + b" other comment\n")
    went_well, said = registered(keys, link)  # put there by hand
    assert not went_well
    assert said[-1].startswith("oslo: REFUSED. oslo: oslo.pub was revoked")
    assert link.status[101] == GONE


def test_a_key_that_flower_alone_remembers(keys: Keys) -> None:
    link = Link()
    link.ever[keys.key("oslo").read_bytes()] = 7
    went_well, said = registered(keys, link)
    assert not went_well
    assert said[0] == "bergen: registered as node 101"
    assert said[1].startswith("oslo: REFUSED. the SuperLink knows this key already")


def test_a_key_that_was_removed_by_hand(keys: Keys) -> None:
    link = Link()
    registered(keys, link)
    link.unregister(101)
    went_well, said = registered(keys, link)
    assert not went_well
    assert said[-1] == "oslo: REFUSED. oslo: its key was removed. The site makes a new key"


def test_a_new_database_knows_nobody(keys: Keys) -> None:
    registered(keys, Link())
    assert registered(keys, Link())[1][-1] == "oslo: registered as node 101"


def cut_off(keys: Keys, name: str) -> None:
    """As where register-sites.sh ended between Flower's answer and the file with its number."""
    (keys.folder / f"{name}.node").unlink()


def test_a_key_whose_number_is_lost_is_not_called_removed(keys: Keys) -> None:
    link, said = Link(), list[str]()
    registered(keys, link)
    cut_off(keys, "oslo")
    assert not remove_site(keys, link, "oslo", said.append)
    assert link.status[101] == "registered"
    assert said[-1] == (
        "oslo: NOT REMOVED. The number of its key oslo.1.pub is not kept, and the SuperLink has a "
        "node that no key here explains: 101 (registered). If it is this site's: "
        "./flwr supernode unregister NODE trial"
    )
    said.clear()
    link.unregister(101)  # as the line says
    assert remove_site(keys, link, "oslo", said.append)
    assert said[-1].startswith("oslo: removed, with every key it had")


def test_a_key_that_was_never_registered_is_removed(keys: Keys) -> None:
    link, said = Link(), list[str]()
    assert remove_site(keys, link, "oslo", said.append)
    assert said[-1].startswith("oslo: removed, with every key it had")


def test_a_damaged_number_is_a_lost_one(keys: Keys) -> None:
    link, said = Link(), list[str]()
    registered(keys, link)
    (keys.folder / "oslo.node").write_bytes(b"\xff10")
    assert not remove_site(keys, link, "oslo", said.append)
    assert "which no key" not in said[-1]
    assert "no key here explains: 101 (registered)" in said[-1]


def test_a_replaced_key_without_number_is_told(trial: Path, keys: Keys, tmp_path: Path) -> None:
    link = Link()
    registered(keys, link)
    cut_off(keys, "oslo")
    add_site(trial, read_plan(trial), "oslo", public_key=make_node_key(tmp_path / "k", "oslo"))
    went_well, said = registered(keys, link)
    assert not went_well
    assert "oslo: registered as node 102" in said
    assert said[-1].startswith("oslo: NOT REVOKED. The number of its key oslo.1.pub is not kept")


def test_a_revocation_that_was_cut_off_leaves_no_number_with_the_next_key(
    trial: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Link()
    registered(keys, link)
    move, moved = Path.rename, list[Path]()

    def once(path: Path, to: Path) -> Path:
        if moved:
            raise KeyboardInterrupt
        moved.append(path)
        return move(path, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", once)
        with pytest.raises(KeyboardInterrupt):
            keys.revoke("oslo")
    add_site(trial, read_plan(trial), "oslo", public_key=make_node_key(tmp_path / "k", "oslo"))
    assert registered(keys, link)[0]
    assert (keys.node("oslo"), link.status[101]) == (102, GONE)


def test_the_number_is_written_whole(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> int:
        path.write_bytes(text.encode()[:1])
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space"):
            registered(keys, Link())
    assert keys.node("bergen") is None


def test_two_sites_do_not_share_a_key(trial: Path, keys: Keys) -> None:
    with pytest.raises(UsageError, match="is the key of bergen: each site makes its own"):
        keys.accept("oslo", keys.key("bergen"))
