"""The authority and its server certificates, judged by OpenSSL through Python's ssl."""

import datetime
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509

from core.errors import UsageError
from deployment.certificates import Certificate, issue_server, make_authority
from deployment.superlink_probe import read_certificate

NAMES = ("fed.example.org", "localhost", "127.0.0.1")


@contextmanager
def serving(folder: Path, server: Certificate) -> Iterator[int]:
    """A TLS server with this certificate that shakes hands once; its port."""
    chain = folder / "chain.pem"
    chain.write_bytes(server.certificate + server.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(30)

    def shake_hands() -> None:
        plain, _ = listener.accept()
        try:
            context.wrap_socket(plain, server_side=True).close()
        except OSError:
            plain.close()

    thread = threading.Thread(target=shake_hands)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        thread.join()
        listener.close()


def saved(folder: Path, authority: Certificate) -> Path:
    path = folder / "ca.pem"
    path.write_bytes(authority.certificate)
    return path


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_site_trusts_the_server_that_its_authority_signed(tmp_path: Path, host: str) -> None:
    authority = make_authority("trial")
    with serving(tmp_path, issue_server(authority, NAMES)) as port:
        until = read_certificate(f"{host}:{port}", saved(tmp_path, authority))
    assert 395 <= (until - datetime.datetime.now(datetime.UTC)).days <= 397


def test_another_authority_of_the_same_name_is_not_trusted(tmp_path: Path) -> None:
    impostor = issue_server(make_authority("trial"), NAMES)
    trusted = saved(tmp_path, make_authority("trial"))
    with (
        serving(tmp_path, impostor) as port,
        pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"),
    ):
        read_certificate(f"localhost:{port}", trusted)


def test_a_name_that_is_not_in_the_certificate_is_refused(tmp_path: Path) -> None:
    authority = make_authority("trial")
    server = issue_server(authority, ["fed.example.org"])
    with (
        serving(tmp_path, server) as port,
        pytest.raises(ssl.SSLCertVerificationError, match=r"[Hh]ostname mismatch"),
    ):
        read_certificate(f"localhost:{port}", saved(tmp_path, authority))


def test_an_old_certificate_is_refused(tmp_path: Path) -> None:
    authority = make_authority("trial")
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=400)
    with (
        serving(tmp_path, issue_server(authority, NAMES, long_ago)) as port,
        pytest.raises(ssl.SSLCertVerificationError, match="expired"),
    ):
        read_certificate(f"localhost:{port}", saved(tmp_path, authority))


def test_a_server_certificate_signs_nothing() -> None:
    server = x509.load_pem_x509_certificate(
        issue_server(make_authority("trial"), NAMES).certificate
    )
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = server.extensions.get_extension_for_class(x509.KeyUsage).value
    assert not usage.key_cert_sign
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]


@pytest.mark.parametrize("odd", ["fed.example.org:9092", "https://fed", "a b", "", "fed_1", "ü.de"])
def test_an_address_is_a_name_or_an_ip(odd: str) -> None:
    with pytest.raises(UsageError, match="expects a DNS name or an IP address, without a port"):
        issue_server(make_authority("trial"), [odd])
