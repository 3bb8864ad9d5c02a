"""The key pair by which a SuperNode proves who it is: ECDSA on P-384, in OpenSSH's format.

The same as `ssh-keygen -t ecdsa -b 384 -N "" -f node.key`. The SuperLink knows the public half.
"""

import base64
import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from core.errors import UsageError
from deployment.private_files import write_private


def make_node_key(path: Path, name: str) -> Path:
    """Write a new key pair to `path` (mode 600) and `path`.pub; returns the latter.

    UsageError where there is a key already: a site that has been registered would lose its place.
    """
    if path.exists():
        raise UsageError(
            f"{path} exists already. To make a new one, move it away first; the coordinator then "
            "has to register the new public key"
        )
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = path.with_name(f"{path.name}.pub")
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    public.write_bytes(line + f" {name}\n".encode())
    return public


def read_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key in this file; UsageError where there is none that Flower takes."""
    try:
        key = load_ssh_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is not a private key in OpenSSH's format: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UsageError(f"{path} is no elliptic-curve key: make one with bouquet deploy key")
    return key


def fingerprint(public_key: Path) -> str:
    """SHA256:... of the key itself, without the comment behind it, as `ssh-keygen -lf` prints."""
    key = load_ssh_public_key(public_key.read_bytes())
    told = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1]
    digest = hashlib.sha256(base64.b64decode(told)).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def check_public_key(path: Path) -> None:
    """UsageError unless the file holds the public half of such a key, and no private one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if b"PRIVATE KEY" in data:
        raise UsageError(
            f"{path} holds a private key, which belongs to the site alone: take the file that ends "
            "in .pub, and have the site make a new key"
        )
    try:
        key = load_ssh_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is not a public key in OpenSSH's format: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UsageError(f"{path} is no elliptic-curve key (ssh-keygen -t ecdsa -b 384)")
