"""Which keys may join: what the coordinator keeps of them, and what it tells the SuperLink.

coordinator/keys/NAME.pub           the key in force for the site NAME
coordinator/keys/NAME.node          the number by which Flower knows it (server/names.py), and the
                                    fingerprint of the key that it belongs to
coordinator/keys/revoked/NAME.N.*   the same of each key that the site had before

Flower never takes a key again that it has once removed; so a removed key is kept, to be named when
it comes again.
"""

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import BouquetError, UsageError, listing
from deployment.node_keys import check_public_key, fingerprint
from deployment.plan import check_name
from server.names import read_number

GONE = "unregistered"
"""What Flower calls a node whose key it refuses."""


class Flower:
    """The SuperLink, asked by Flower's own command as the operator would."""

    def __init__(self, link: str) -> None:
        self._link = link

    def nodes(self) -> dict[int, str]:
        """Node -> registered, online, offline or unregistered."""
        told = self._ask("list", "--verbose")
        return {int(node["node-id"]): str(node["status"]) for node in told["nodes"]}

    def register(self, key: Path, name: str) -> int:
        """The number of the node that this key makes."""
        return int(self._ask("register", str(key), "--name", name)["node-id"])

    def unregister(self, node: int) -> None:
        """From now on the SuperLink refuses the key of this node."""
        self._ask("unregister", str(node))

    def how_to_unregister(self) -> str:
        """What the operator types, in the coordinator's folder."""
        return f"./flwr supernode unregister NODE {self._link}"

    def _ask(self, action: str, *arguments: str) -> dict[str, Any]:
        command = ["flwr", "supernode", action, *_positional(arguments, self._link)]
        done = subprocess.run(
            [*command, "--format", "json"], capture_output=True, text=True, check=False
        )
        try:
            told = json.loads(done.stdout)
        except ValueError:
            told = {}
        if done.returncode != 0 or not told.get("success", False):
            words = told.get("error-message") or done.stderr or done.stdout
            raise BouquetError(
                f"{' '.join(command)} failed: {str(words).strip()}. Is the SuperLink running?"
            )
        return dict(told)


def _positional(arguments: tuple[str, ...], link: str) -> list[str]:
    """Flower wants the SuperLink's name behind the first argument that is no option."""
    words = [word for word in arguments if not word.startswith("--")][:1]
    return [*words, link, *arguments[len(words) :]]


@dataclass(frozen=True)
class Keys:
    """The keys of one deployment."""

    folder: Path
    """coordinator/keys"""

    @property
    def revoked(self) -> Path:
        """Where keys lie that no longer count."""
        return self.folder / "revoked"

    def names(self) -> list[str]:
        """The sites that have a key."""
        return sorted(path.stem for path in self.folder.glob("*.pub"))

    def key(self, name: str) -> Path:
        """The public key in force."""
        return self.folder / f"{name}.pub"

    def node(self, name: str) -> int | None:
        """The number that Flower gave it."""
        return _number(self.folder / f"{name}.node")

    def keep_number(self, name: str, node: int) -> None:
        """Flower knows the key in force by this number, which belongs to no other key."""
        scratch = self.folder / f"{name}.number"
        scratch.write_text(f"{node}\n{fingerprint(self.key(name))}\n")
        scratch.replace(self.folder / f"{name}.node")  # whole or not at all: a server reads it

    def set_aside_number_of_another_key(self, name: str) -> bool:
        """Where NAME.pub was replaced on another machine: its number is that of the key before.

        True where it was; the number now counts among the revoked ones.
        """
        number = self.folder / f"{name}.node"
        owner, ours = _owner(number), fingerprint(self.key(name))
        if not owner or owner == ours or self._where_revoked(ours):
            return False
        number.rename(self.revoked / f"{self._place(name, owner)}.node")
        return True

    def _place(self, name: str, owner: str) -> str:
        """NAME.N below revoked/ for the number of this key: beside the key, if that lies there."""
        for old in sorted(self.revoked.glob(f"{name}.*.pub")):
            if fingerprint(old) == owner and not old.with_suffix(".node").exists():
                return old.stem
        return self._next_place(name)

    def _next_place(self, name: str) -> str:
        """NAME.N with the lowest N that is free."""
        self.revoked.mkdir(exist_ok=True)
        count = 1
        while any((self.revoked / f"{name}.{count}.{end}").exists() for end in ("pub", "node")):
            count += 1
        return f"{name}.{count}"

    def accept(self, name: str, public_key: Path) -> bool:
        """Make this the site's key; True where another was in force, which is revoked.

        UsageError for a key that counts no longer, or that another site has.
        """
        check_public_key(public_key)
        self.refuse_revoked(name, public_key)
        ours = fingerprint(public_key)
        for other in self.names():
            if other != name and fingerprint(self.key(other)) == ours:
                raise UsageError(f"{public_key} is the key of {other}: each site makes its own")
        replaced = self.key(name).exists() and fingerprint(self.key(name)) != ours
        if replaced:
            self.revoke(name)
        self.key(name).write_bytes(public_key.read_bytes())
        return replaced

    def refuse_revoked(self, name: str, public_key: Path) -> None:
        """UsageError for a key that was revoked: Flower never takes it again."""
        if old := self._where_revoked(fingerprint(public_key)):
            raise UsageError(
                f"{name}: {public_key.name} was revoked ({old.name} in {self.revoked}), and a "
                "SuperLink never takes a revoked key again. The site makes a new key: bouquet "
                "deploy key, after moving node.key away"
            )

    def _where_revoked(self, ours: str) -> Path | None:
        """The file below revoked/ that holds this key, or the number that it had."""
        held = [(fingerprint(old), old) for old in sorted(self.revoked.glob("*.pub"))]
        held += [(_owner(old), old) for old in sorted(self.revoked.glob("*.node"))]
        return next((old for owner, old in held if owner == ours), None)

    def revoke(self, name: str) -> None:
        """The key in force counts no longer; register-sites.sh tells the SuperLink."""
        self.set_aside_number_of_another_key(name)
        place = self._next_place(name)
        for suffix in ("node", "pub"):  # a key without number is told, a number without key counts
            path = self.folder / f"{name}.{suffix}"
            if path.exists():
                path.rename(self.revoked / f"{place}.{suffix}")

    def revoked_nodes(self, name: str | None = None) -> Iterator[tuple[str, int]]:
        """(site, node) of each key that counts no longer, of one site or of all."""
        for path in sorted(self.revoked.glob("*.node")):
            site = path.name.rsplit(".", 2)[0]
            number = _number(path)
            if number is not None and name in (None, site):
                yield site, number

    def revoked_without_number(self) -> Iterator[tuple[str, str]]:
        """(site, file) of each revoked key whose number is lost, or that was never registered."""
        for path in sorted(self.revoked.glob("*.pub")):
            if _number(path.with_suffix(".node")) is None:
                yield path.name.rsplit(".", 2)[0], path.name

    def unexplained(self, known: dict[int, str]) -> list[str]:
        """The nodes that the SuperLink still takes though no key here is known to be theirs."""
        ours = {self.node(name) for name in self.names()} | {
            node for _, node in self.revoked_nodes()
        }
        return [
            f"{node} ({status})"
            for node, status in sorted(known.items())
            if status != GONE and node not in ours
        ]


def register_sites(keys: Keys, flower: Flower, say: Callable[[str], None]) -> bool:
    """First revoke what counts no longer, then register what is new; True where all went well."""
    if not keys.names():
        raise UsageError(f"there is no public key in {keys.folder}")
    for name in keys.names():
        if keys.set_aside_number_of_another_key(name):
            say(f"{name}: has another key than the one that was registered")
    known = flower.nodes()
    _unregister_revoked(keys, flower, known, say)
    went_well = True
    for name in keys.names():
        node = keys.node(name)
        status = known.get(node, "") if node is not None else ""
        try:
            keys.refuse_revoked(name, keys.key(name))
            if status == GONE:
                keys.revoke(name)
                raise UsageError(f"{name}: its key was removed. The site makes a new key")
            if status:
                say(f"{name}: registered before, as node {node}")
                continue
            node = _register(keys, flower, name)
            say(f"{name}: registered as node {node}")
        except UsageError as error:
            say(f"{name}: REFUSED. {error}")
            went_well = False
    return not _tell_lost(keys, flower, "NOT REVOKED", say) and went_well


def _register(keys: Keys, flower: Flower, name: str) -> int:
    try:
        node = flower.register(keys.key(name), name)
    except BouquetError as error:
        if "already in use" not in str(error):
            raise
        raise UsageError(
            f"the SuperLink knows this key already, of a node whose number is not kept in "
            f"{keys.folder}: it was removed, or registered by hand. The site makes a new key"
        ) from None
    keys.keep_number(name, node)
    return node


def remove_site(keys: Keys, flower: Flower, name: str, say: Callable[[str], None]) -> bool:
    """Revoke every key that the site ever had, and say what the SuperLink knows of it then.

    False where the number of one of them is lost and the SuperLink may take that key still.
    """
    check_name(name)
    ever = {site for site, _ in (*keys.revoked_nodes(), *keys.revoked_without_number())}
    if name not in (*keys.names(), *ever):
        raise UsageError(
            f"there is no site {name!r} in {keys.folder}; it has {listing(keys.names())}"
        )
    if keys.key(name).exists():
        keys.revoke(name)
    _unregister_revoked(keys, flower, flower.nodes(), say)
    after = flower.nodes()
    for _, node in keys.revoked_nodes(name):
        say(f"{name}: the SuperLink has node {node} as {after.get(node, 'nothing')}")
    if _tell_lost(keys, flower, "NOT REMOVED", say, name):
        return False
    left = [f"{site} ({after.get(keys.node(site) or 0, 'not yet')})" for site in keys.names()]
    say(f"{name}: removed, with every key it had. May join: {listing(left, 50) or 'nobody'}")
    return True


def _tell_lost(
    keys: Keys, flower: Flower, what: str, say: Callable[[str], None], name: str | None = None
) -> bool:
    """Whether a key may count still because its number is lost; says which, and what to do."""
    lost = [(site, key) for site, key in keys.revoked_without_number() if name in (None, site)]
    unexplained = keys.unexplained(flower.nodes()) if lost else []
    for site, key in lost if unexplained else ():
        say(
            f"{site}: {what}. The number of its key {key} is not kept, and the SuperLink has "
            f"{'a node' if len(unexplained) == 1 else 'nodes'} that no key here explains: "
            f"{listing(unexplained, 20)}. If it is this site's: {flower.how_to_unregister()}"
        )
    return bool(lost and unexplained)


def _unregister_revoked(
    keys: Keys, flower: Flower, known: dict[int, str], say: Callable[[str], None]
) -> None:
    for site, node in keys.revoked_nodes():
        if known.get(node, GONE) != GONE:
            flower.unregister(node)
            say(f"{site}: the key of node {node} is revoked")


def _owner(path: Path) -> str:
    """The fingerprint behind the number in this file; empty where an older version wrote it."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError):
        return ""
    return lines[1] if len(lines) > 1 else ""


def _number(path: Path) -> int | None:
    try:
        return read_number(path)
    except (OSError, ValueError):
        return None
