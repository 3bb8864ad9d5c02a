"""What a site can find out about a SuperLink without joining it.

Two calls over the port that SuperNodes use, which the SuperLink refuses for a reason that tells how
far they came, and which change nothing: a pull for a node that does not exist (refused after
signature and time were looked at), and an activation whose heartbeat interval is out of bounds
(refused after the key was looked up).
"""

import datetime
import json
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import (
    PUBLIC_KEY_HEADER,
    SIGNATURE_HEADER,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
)
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

SECONDS = 10.0
NO_INTERVAL, NO_NODE = 0.0, 0
WINDOW = TIMESTAMP_TOLERANCE + 2 * SYSTEM_TIME_TOLERANCE
"""Seconds between the earliest and the latest time stamp that a SuperLink takes."""
FARTHEST = 3600.0
FINEST = 0.1


class Standing(Enum):
    """How far a call came."""

    REGISTERED = "registered"
    UNREGISTERED = "unregistered"
    WRONG_TIME = "wrong time"
    NO_SUCH_NODE = "no such node"
    REFUSED = "refused"


@dataclass(frozen=True)
class Answer:
    """What the SuperLink made of a call."""

    standing: Standing
    words: str


def read_certificate(superlink: str, authority: Path) -> datetime.datetime:
    """Shake hands over TLS, trusting this authority alone; until when the certificate is valid.

    Raises OSError (ssl.SSLError among them) with what went wrong.
    """
    host, port = split_address(superlink)
    context = ssl.create_default_context(cafile=str(authority))
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, port), timeout=SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=host) as wrapped,
    ):
        certificate = wrapped.getpeercert() or {}
    seconds = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def split_address(superlink: str) -> tuple[str, int]:
    """Host and port.

    >>> split_address("[::1]:9092")
    ('::1', 9092)
    """
    host, _, port = superlink.rpartition(":")
    return host.strip("[]"), int(port)


class Probe:
    """One connection to a SuperLink's Fleet API."""

    def __init__(self, superlink: str, authority: Path | None) -> None:
        """authority: the CA to trust; None: in the clear."""
        if authority is None:
            self._channel = grpc.insecure_channel(superlink)
        else:
            credentials = grpc.ssl_channel_credentials(authority.read_bytes())
            self._channel = grpc.secure_channel(superlink, credentials)
        self._stub = FleetStub(self._channel)

    def wait_until_ready(self) -> None:
        """Raises grpc.FutureTimeoutError where no channel comes about."""
        grpc.channel_ready_future(self._channel).result(timeout=SECONDS)

    def knock(self, key: ec.EllipticCurvePrivateKey, ahead: float = 0.0) -> Answer:
        """Is this key registered? With a time stamp `ahead` seconds ahead of this clock."""
        public = public_key_to_bytes(key.public_key())
        request = ActivateNodeRequest(public_key=public, heartbeat_interval=NO_INTERVAL)
        return self._call(self._stub.ActivateNode, request, key, ahead)

    def greet(self, key: ec.EllipticCurvePrivateKey, ahead: float = 0.0) -> Answer:
        """Is this time stamp taken? NO_SUCH_NODE where it is, whatever the key."""
        request = PullMessagesRequest(node=Node(node_id=NO_NODE))
        return self._call(self._stub.PullMessages, request, key, ahead)

    def _call(
        self, method: Any, request: Any, key: ec.EllipticCurvePrivateKey, ahead: float
    ) -> Answer:
        now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ahead)
        stamp = now.isoformat()
        version = RuntimeVersionMetadata.from_local_component("SuperNode")
        metadata = [
            *version.append_to_grpc_metadata(()),
            (PUBLIC_KEY_HEADER, public_key_to_bytes(key.public_key())),
            (TIMESTAMP_HEADER, stamp),
            (SIGNATURE_HEADER, sign_message(key, stamp.encode())),
        ]
        try:
            method(request, timeout=SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            return _understood(error.details() or error.code().name)
        return Answer(Standing.REFUSED, "it took a call that a SuperLink of Flower 1.39 refuses")

    def close(self) -> None:
        """Hang up."""
        self._channel.close()


def _understood(details: str) -> Answer:
    plain = {
        "Invalid timestamp": Standing.WRONG_TIME,
        "Invalid node ID": Standing.NO_SUCH_NODE,
    }
    if details in plain:
        return Answer(plain[details], details)
    try:
        answer = json.loads(details)
        code, words = int(answer["code"]), str(answer["public_message"])
    except (ValueError, KeyError, TypeError):
        return Answer(Standing.REFUSED, details)
    words = " ".join(filter(None, (words, answer.get("public_details"))))
    standing = {
        int(ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL): Standing.REGISTERED,
        int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED): Standing.UNREGISTERED,
    }.get(code, Standing.REFUSED)
    return Answer(standing, words)


def clock_difference(takes: Callable[[float], bool]) -> float | None:
    """The SuperLink's clock less this one's, in seconds, from which time stamps it takes.

    takes: whether it takes a stamp so many seconds ahead of this clock. It does from
    `difference` - 305 to `difference` + 5. None: it takes none within an hour.

    >>> round(clock_difference(lambda ahead: -305 + 42 < ahead < 5 + 42), 1)
    42.0
    """
    steps = int(FARTHEST / (WINDOW / 2))
    places = sorted((step * WINDOW / 2 for step in range(-steps, steps + 1)), key=abs)
    taken = next((place for place in places if takes(place)), None)
    if taken is None:
        return None
    refused = taken + WINDOW
    while refused - taken > FINEST:
        middle = (taken + refused) / 2
        if takes(middle):
            taken = middle
        else:
            refused = middle
    return (taken + refused) / 2 - SYSTEM_TIME_TOLERANCE
