"""What a site owns and decides for itself: its node config wins over the run's configuration."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from core.errors import UsageError, quoted
from settings.keys import Value, unknown_key

TEXTS = ("data-path", "evaluation-path", "model-path", "device", "cache-path")
KNOWN = (
    "partition-id",
    "num-partitions",
    "name",
    "rank",
    "min-examples",
    "trust-remote-code",
    *TEXTS,
)
NAME = r"[a-z0-9][a-z0-9-]{0,39}"
"""A site's name, wherever one stands: it may become a folder's or a systemd unit's."""


@dataclass(frozen=True)
class Site:
    """One client's own settings; None where the run decides."""

    name: str
    """What this client is called in logs and weights; simulated ones are client-00, client-01."""
    number: int
    """Its number among the clients, counted from 0; ranks and parts of the data go by it."""
    rank: int | None = None
    data_path: str | None = None
    evaluation_path: str | None = None
    """The site's own test set; None: it holds out a share of its data."""
    model_path: str | None = None
    device: str | None = None
    cache_path: str | None = None
    """Folder in which the site keeps what it need not be sent twice; None: it keeps nothing."""
    min_examples: int = 1
    """With fewer training examples the site does not train, whatever the run asks for."""
    trust_remote_code: bool = False
    """The site's own consent to run the Python code that a model brings along."""


def client_name(number: int) -> str:
    """The name of a client that gave itself none.

    >>> client_name(7)
    'client-07'
    """
    return f"client-{number:02d}"


def parse_site(node_config: Mapping[str, Value]) -> Site:
    """A site from its node config (`flower-supernode --node-config "rank=8 name='oslo'"`).

    >>> parse_site({"partition-id": 2, "num-partitions": 10, "rank": 8}).rank
    8
    """
    for name in node_config:
        if name not in KNOWN:
            raise UsageError(unknown_key(name, list(KNOWN)))
    number = _whole_number(node_config, "partition-id", "partition-id", at_least=0) or 0
    rank = _whole_number(node_config, "rank", "the site's rank", at_least=1)
    least = _whole_number(node_config, "min-examples", "the site's min-examples", at_least=1)
    _whole_number(node_config, "num-partitions", "num-partitions", at_least=1)
    trusts = node_config.get("trust-remote-code", False)
    if not isinstance(trusts, bool):
        raise UsageError(f"trust-remote-code must be true or false; got {trusts!r}")
    name = str(node_config.get("name", client_name(number)))
    if not re.fullmatch(NAME, name):
        raise UsageError(
            f"{quoted(name, 80)!r} is no name for a site: up to 40 lower-case letters, digits and "
            "hyphens, such as oslo or site-2"
        )
    text = {key: str(node_config[key]) for key in TEXTS if key in node_config}
    return Site(
        name=name,
        number=number,
        rank=rank,
        data_path=text.get("data-path"),
        evaluation_path=text.get("evaluation-path"),
        model_path=text.get("model-path"),
        device=text.get("device"),
        cache_path=text.get("cache-path"),
        min_examples=least or 1,
        trust_remote_code=trusts,
    )


def _whole_number(
    node_config: Mapping[str, Value], name: str, what: str, at_least: int
) -> int | None:
    value = node_config.get(name)
    if value is None or (type(value) is int and value >= at_least):  # True is an int, too
        return value
    raise UsageError(f"{what} must be a whole number of at least {at_least}; got {value!r}")
