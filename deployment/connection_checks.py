"""Checks of a site's key, and of the way to the SuperLink."""

import datetime
import socket
import ssl
from collections.abc import Iterator

import grpc
from cryptography.hazmat.primitives.asymmetric import ec

from core.errors import UsageError
from deployment.findings import Finding, fine, mend, note
from deployment.flower_version import FLOWER, refuse_http, speaks_grpc
from deployment.node_keys import read_node_key
from deployment.private_files import may_others_read
from deployment.site_file import SiteFile
from deployment.superlink_probe import (
    SECONDS,
    Answer,
    Probe,
    Standing,
    clock_difference,
    read_certificate,
    split_address,
)

REGISTERED, UNREGISTERED = Standing.REGISTERED, Standing.UNREGISTERED
SOON_DAYS = 30
CLOCK_SECONDS = 2.0


def check_connection(site: SiteFile) -> Iterator[Finding]:
    """Key, port, certificate, channel, registration and clock."""
    key: ec.EllipticCurvePrivateKey | None = None
    if not site.insecure:
        try:
            refuse_http()
        except UsageError as error:
            yield mend("Flower", str(error))
            return
    if site.insecure:
        yield note(
            "key", "none: there is no ca.pem here, so everything goes in the clear and anyone joins"
        )
    else:
        path = site.folder / "node.key"
        try:
            key = read_node_key(path)
        except UsageError as error:
            yield mend("key", f"{error}. bouquet deploy key {site.folder} makes one")
        else:
            if may_others_read(path):
                yield mend("key", f"others may read {path}: chmod 600 {path}")
            else:
                yield fine("key", "node.key, for its owner only")
    yield _check_port(site)
    if not site.insecure:
        found = _check_certificate(site)
        yield found
        if found.sentence.startswith("no connection"):
            return
    if speaks_grpc():
        yield from _check_call(site, key)
    else:
        yield _check_listener(site)


def _check_port(site: SiteFile) -> Finding:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", site.port))
        except OSError:
            return note(
                "port",
                f"{site.port} is in use on this machine: by this SuperNode if it runs already, "
                "otherwise take another number in site.toml",
            )
    return fine("port", f"{site.port} is free for the SuperNode's own processes")


def _check_certificate(site: SiteFile) -> Finding:
    try:
        until = read_certificate(site.superlink, site.folder / "ca.pem")
    except ssl.SSLCertVerificationError as error:
        return mend("certificate", f"{site.superlink}: {_certificate_trouble(error)}")
    except ssl.SSLError as error:
        return mend(
            "certificate",
            f"no connection: {site.superlink} does not speak TLS ({error.reason}). Is it the "
            "SuperLink's port for SuperNodes, and was it started without --insecure?",
        )
    except OSError as error:
        return mend(
            "certificate",
            f"no connection to {site.superlink}: {error.strerror or error}. Does the SuperLink "
            "run, is the address in site.toml right, does the firewall let this site out to it?",
        )
    days = (until - datetime.datetime.now(datetime.UTC)).days
    if days < SOON_DAYS:
        return note(
            "certificate",
            f"the SuperLink's runs out in {days} days: have the coordinator run bouquet deploy "
            "renew",
        )
    return fine("certificate", f"signed by this federation's authority, valid for {days} days")


def _certificate_trouble(error: ssl.SSLCertVerificationError) -> str:
    reason = error.verify_message
    if "mismatch" in reason or "doesn't match" in reason:
        return f"{reason}. The coordinator adds this name: bouquet deploy renew DIR --address NAME"
    if "not yet valid" in reason:
        return f"{reason}: this machine's clock is slow"
    if "expired" in reason:
        return f"{reason}: the coordinator runs bouquet deploy renew; or this clock is fast"
    return f"{reason}. Is ca.pem the one of this federation?"


def _check_call(site: SiteFile, key: ec.EllipticCurvePrivateKey | None) -> Iterator[Finding]:
    authority = None if site.insecure else site.folder / "ca.pem"
    probe = Probe(site.superlink, authority)
    try:
        try:
            probe.wait_until_ready()
        except grpc.FutureTimeoutError:
            yield mend(
                "SuperLink",
                f"no gRPC channel to {site.superlink}: something between lets TLS through but not "
                "HTTP/2, or nothing listens there",
            )
            return
        stranger = ec.generate_private_key(ec.SECP384R1())
        first = probe.greet(stranger)
        if first.standing is Standing.REFUSED:
            yield mend("SuperLink", f"{site.superlink} refuses this site: {first.words}")
            return
        difference = clock_difference(
            lambda ahead: probe.greet(stranger, ahead).standing is Standing.NO_SUCH_NODE
        )
        if key is None:
            yield fine("SuperLink", f"{site.superlink} answers")
        else:
            yield _registration(probe.knock(key, difference or 0.0), site)
        yield _clock(difference)
    finally:
        probe.close()


def _check_listener(site: SiteFile) -> Finding:
    try:
        socket.create_connection(split_address(site.superlink), timeout=SECONDS).close()
    except OSError as error:
        return mend(
            "SuperLink",
            f"no connection to {site.superlink}: {error.strerror or error}. Does the SuperLink "
            "run?",
        )
    return note(
        "SuperLink",
        f"something listens at {site.superlink}; no more is asked, since Flower {FLOWER} speaks "
        "HTTP and this check gRPC. The clock is not compared either",
    )


def _registration(answer: Answer, site: SiteFile) -> Finding:
    if answer.standing is REGISTERED:
        return fine("SuperLink", f"{site.superlink} answers and knows this site's key")
    if answer.standing is UNREGISTERED:
        return mend(
            "SuperLink",
            f"{site.superlink} answers but does not know this key: have the coordinator put "
            "node.key.pub into its keys/ and run register-sites.sh",
        )
    return mend("SuperLink", f"{site.superlink} refuses this site: {answer.words}")


def _clock(difference: float | None) -> Finding:
    limits = "a site's clock may be 5 s ahead of the SuperLink's and 5 minutes behind it"
    if difference is None:
        return mend("clock", f"more than an hour from the SuperLink's, or no way to tell: {limits}")
    side = "behind" if difference > 0 else "ahead of"
    found = f"{abs(difference):.1f} s {side} the SuperLink's"
    if abs(difference) <= CLOCK_SECONDS:
        return fine("clock", f"within {CLOCK_SECONDS:g} s of the SuperLink's")
    if -5 < difference < 300:
        return note("clock", f"{found}; {limits}. Set it by NTP")
    return mend("clock", f"{found}, and {limits}: set it by NTP")
