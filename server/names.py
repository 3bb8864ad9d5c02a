"""What the coordinator calls a site: by the key with which it connected, not by what it says.

Where a deployment has keys, its start script names the folder of registered ones in
BOUQUET_SITE_KEYS: NAME.node holds the number by which Flower knows the SuperNode whose key was
registered for the site NAME. Flower hands the messages to that number to no other key, and none can
be answered by who has not read it (server/mailbox.py).
"""

import os
from collections.abc import Mapping
from pathlib import Path

from core.errors import ReplyError, quoted
from core.events import log, logfmt

REGISTRY = "BOUQUET_SITE_KEYS"
LONGEST_NUMBER = len(str(2**64))
"""Digits: Flower numbers its nodes from 0 to 2^64 - 1."""


def registered_names() -> Mapping[int, str] | None:
    """Node -> name of the site, as registered now; None where nobody registers sites."""
    folder = os.environ.get(REGISTRY)
    if not folder:
        return None
    names = {}
    for path in sorted(Path(folder).glob("*.node")):
        try:
            names[read_number(path)] = path.stem
        except FileNotFoundError:
            continue  # revoked since the folder was listed
        except (OSError, ValueError) as error:
            log.error(logfmt("registry-damaged", path=path, reason=quoted(error, 200)))
    return names


def read_number(path: Path) -> int:
    """The number of a node, the first line of its file; ValueError where it holds another thing."""
    held = (path.read_bytes().splitlines() or [b""])[0].strip()
    if not held.isdigit() or len(held) > LONGEST_NUMBER:
        raise ValueError(f"it should hold a node's number and holds {quoted(held, 40)}")
    return int(held)


def true_name(node: int, claimed: str) -> str:
    """The name under which a node takes part: the registered one, whatever it calls itself.

    Raises ReplyError for a node that is not registered where others are.
    """
    names = registered_names()
    if names is None:
        return claimed
    if node not in names:
        raise ReplyError(
            f"node {node}, which calls itself {quoted(claimed, 80)}, is not registered for any "
            "site: coordinator/register-sites.sh registers it"
        )
    if names[node] != claimed:
        called = {"node": node, "registered": names[node], "claims": quoted(claimed, 80)}
        log.warning(logfmt("another-name", **called))
    return names[node]


def refuse_removed(node: int) -> None:
    """ReplyError for a node whose key was removed since it was asked."""
    names = registered_names()
    if names is not None and node not in names:
        raise ReplyError("its key was removed while it was at work")


def name_of_node(node: int) -> str:
    """What to call a node that has not answered."""
    return (registered_names() or {}).get(node, f"node {node}")
