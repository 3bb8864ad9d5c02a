"""The federation's own certificate authority, and the server certificate that it signs.

Sites trust this one authority and nothing else. Its key signs the server's certificate, now and at
each renewal, and is needed at no other time.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from core.errors import UsageError

AUTHORITY_DAYS = 3650
SERVER_DAYS = 397
EARLIER = datetime.timedelta(hours=1)
"""Certificates are valid from a little before now, for sites whose clocks are slow."""


@dataclass(frozen=True)
class Certificate:
    """A certificate and its private key, both as PEM."""

    certificate: bytes
    key: bytes


def make_authority(name: str, now: datetime.datetime | None = None) -> Certificate:
    """A new self-signed authority of this name."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Bouquet federation {name}")])
    builder = (
        _builder(subject, subject, key.public_key(), AUTHORITY_DAYS, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
    )
    return _signed(builder, key, key)


def issue_server(
    authority: Certificate, addresses: Sequence[str], now: datetime.datetime | None = None
) -> Certificate:
    """A server certificate for these DNS names and IP addresses, signed by the authority."""
    names = [general_name(address) for address in addresses]
    signing = load_pem_private_key(authority.key, password=None)
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    if not isinstance(signing, ec.EllipticCurvePrivateKey):
        raise UsageError("the authority's key is not the elliptic-curve key that init wrote")
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, addresses[0][:64])])
    public = issuer.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    builder = (
        _builder(subject, issuer.subject, key.public_key(), SERVER_DAYS, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
            critical=False,
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(public),
            critical=False,
        )
    )
    return _signed(builder, key, signing)


def general_name(address: str) -> x509.GeneralName:
    """An IP address or a DNS name, as a certificate holds it.

    >>> general_name("127.0.0.1")
    <IPAddress(value=127.0.0.1)>
    >>> general_name("fed.example.org")
    <DNSName(value='fed.example.org')>
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        pass
    labels = address.removesuffix(".").split(".")
    letters = all(part and part.isascii() and part.replace("-", "").isalnum() for part in labels)
    if not letters or len(address) > 253:
        raise UsageError(
            f"--address expects a DNS name or an IP address, without a port; got {address!r}"
        )
    return x509.DNSName(address)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    days: int,
    now: datetime.datetime | None,
) -> x509.CertificateBuilder:
    now = now or datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _signed(
    builder: x509.CertificateBuilder,
    key: ec.EllipticCurvePrivateKey,
    signing: ec.EllipticCurvePrivateKey,
) -> Certificate:
    return Certificate(
        builder.sign(signing, hashes.SHA384()).public_bytes(Encoding.PEM),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )
