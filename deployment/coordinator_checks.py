"""Checks of the coordinator's folder, before its SuperLink starts or while it runs."""

import datetime
import re
import socket
import sqlite3
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from core.errors import UsageError, listing
from core.units import counted, human_bytes
from deployment.findings import Finding, fine, mend, note
from deployment.flower_version import refuse_http
from deployment.machine import free_disk
from deployment.registration import Keys

START = "start-superlink.sh"
RENEW_DAYS = 30
LITTLE_DISK = 5 * 10**9


def is_coordinator(folder: Path) -> bool:
    """Whether this is the folder that `init` writes for the machine with the SuperLink."""
    return (folder / START).is_file()


def check_coordinator(folder: Path) -> Iterator[Finding]:
    """Flower, certificate, keys, ports, database, disk and sites, a line each."""
    secure = (folder / "server.pem").exists()
    if secure:
        try:
            refuse_http()
        except UsageError as error:
            yield mend("flower", str(error))
        else:
            yield fine("flower", "speaks gRPC, as a deployment with keys needs")
        yield from _certificate(folder)
        yield from _private_files(folder)
    else:
        yield note("certificate", "none: this is the insecure form, for one machine")
    yield from _ports(folder, secure)
    yield _database(folder / "superlink.db")
    free = free_disk(folder)
    told = f"{human_bytes(free)} free"
    short = f"{told}: a run keeps its state, and the SuperLink every message on its way"
    yield fine("disk", told) if free >= LITTLE_DISK else note("disk", short)
    if secure:
        yield _sites(Keys(folder / "keys"))


def _certificate(folder: Path) -> Iterator[Finding]:
    try:
        server = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
        authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        key = load_pem_private_key((folder / "server.key").read_bytes(), password=None)
        server.verify_directly_issued_by(authority)
    except Exception as error:  # of many kinds, for a file that is missing, damaged or another's
        yield mend(
            "certificate",
            f"{str(error) or 'ca.pem did not sign server.pem'}: bouquet deploy renew",
        )
        return
    ours, told = (
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        for public in (key.public_key(), server.public_key())
    )
    if ours != told:
        yield mend("certificate", "server.key is not that of server.pem: bouquet deploy renew")
        return
    now = datetime.datetime.now(datetime.UTC)
    left = (server.not_valid_after_utc - now).days
    try:
        names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        yield mend("certificate", "server.pem names no host, so no site trusts it: deploy renew")
        return
    held = listing([str(name.value) for name in names], limit=10)
    if now < server.not_valid_before_utc:
        yield mend("clock", f"it is {now:%Y-%m-%d %H:%M} UTC here, before the certificate begins")
    elif left < 0:
        yield mend("certificate", "has expired: bouquet deploy renew, then restart the SuperLink")
    elif left < RENEW_DAYS:
        yield note("certificate", f"ends in {counted(left, 'day')}: bouquet deploy renew")
    else:
        yield fine("certificate", f"for {held}; {counted(left, 'day')} left")
        yield fine("clock", f"{now:%Y-%m-%d %H:%M:%S} UTC; sites may be 5 s ahead, 5 min behind")


def _private_files(folder: Path) -> Iterator[Finding]:
    key = folder / "server.key"
    mode = stat.S_IMODE(key.stat().st_mode) if key.exists() else 0o600
    if mode & 0o077:
        yield mend("server.key", f"others may read it (mode {mode:o}): chmod 600 {key}")
    else:
        yield fine("server.key", "for its owner only")
    for lost in sorted(folder.rglob("ca.key")):
        yield note("ca.key", f"{lost} signs certificates: it belongs where init ran, not here")


def _ports(folder: Path, secure: bool) -> Iterator[Finding]:
    script = (folder / START).read_text()
    for subject, pattern in (
        ("sites' port", r"--fleet-api-address \S+:(\d+)"),
        ("own port", r"--host \S+ --port (\d+)"),
    ):
        found = re.search(pattern, script)
        if found is None:
            yield note(subject, f"{START} names none")
            continue
        port = int(found[1])
        if not _answers(port):
            yield fine(subject, f"{port} is free: the SuperLink does not run")
        elif subject == "own port":
            yield _health(port, folder / "ca.pem" if secure else None)
        else:
            yield fine(subject, f"{port}: something listens")


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2.0):
            return True
    except OSError:
        return False


def _health(port: int, authority: Path | None) -> Finding:
    scheme = "https" if authority else "http"
    try:
        trusted = ssl.create_default_context(cafile=str(authority)) if authority else True
        answer = httpx.get(f"{scheme}://localhost:{port}/health", verify=trusted, timeout=5.0)
        answer.raise_for_status()
    except (httpx.HTTPError, OSError) as error:  # ca.pem may be missing, or no certificate
        return mend("own port", f"{port} is taken, but no SuperLink of this folder: {error}")
    return fine("own port", f"{port}: the SuperLink answers")


def _database(path: Path) -> Finding:
    if not path.exists():
        return fine("database", "none yet: the SuperLink makes it")
    try:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0)
        try:
            (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
            (sound,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        finally:
            connection.close()
    except sqlite3.Error as error:
        return mend("database", f"{path} cannot be read: {error}. Restore it from a backup")
    size = human_bytes(path.stat().st_size)
    if sound != "ok":
        return mend("database", f"{path} is damaged ({sound}): restore it from a backup")
    if mode != "wal":
        return note("database", f"{size}, journal {mode}: the SuperLink turns it to WAL")
    return fine("database", f"{size}, WAL")


def _sites(keys: Keys) -> Finding:
    names = keys.names()
    waiting = [name for name in names if keys.node(name) is None]
    if waiting:
        return note("sites", f"not registered: {listing(waiting, 20)}. ./register-sites.sh does it")
    return fine("sites", f"registered: {listing(names, 20)}" if names else "none yet")
