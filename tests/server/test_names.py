"""What a site is called: by the registry of keys, also while that is changed or damaged."""

from pathlib import Path

import pytest

from core.errors import ReplyError
from server.names import REGISTRY, name_of_node, registered_names, true_name


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(REGISTRY, str(tmp_path))
    (tmp_path / "bergen.node").write_text("100\n")
    (tmp_path / "oslo.node").write_text("18446744073709551615\n")
    return tmp_path


def test_nobody_registers_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REGISTRY, raising=False)
    assert registered_names() is None
    assert true_name(7, "oslo") == "oslo"
    assert name_of_node(7) == "node 7"


def test_the_registered_name_counts(registry: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert registered_names() == {100: "bergen", 2**64 - 1: "oslo"}
    assert true_name(100, "oslo") == "bergen" == name_of_node(100)
    assert "event=another-name" in caplog.text
    with pytest.raises(ReplyError, match="node 7, which calls itself narvik, is not registered"):
        true_name(7, "narvik")


def test_a_key_that_is_revoked_while_the_registry_is_read(
    registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def revoked_before_it_is_read(path: Path) -> bytes:
        if path.name == "bergen.node":
            path.rename(path.with_name("elsewhere"))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", revoked_before_it_is_read)
    assert registered_names() == {2**64 - 1: "oslo"}


@pytest.mark.parametrize("holds", [b"", b"oslo", b"\xff\xfe1", b"-1", b"1" * 5000, b"1 2"])
def test_a_damaged_number_is_told_and_the_others_count(
    registry: Path, caplog: pytest.LogCaptureFixture, holds: bytes
) -> None:
    (registry / "bergen.node").write_bytes(holds)
    assert registered_names() == {2**64 - 1: "oslo"}
    assert "event=registry-damaged" in caplog.text


def test_what_cannot_be_read_is_told(registry: Path, caplog: pytest.LogCaptureFixture) -> None:
    (registry / "narvik.node").mkdir()
    assert registered_names() == {100: "bergen", 2**64 - 1: "oslo"}
    assert "event=registry-damaged" in caplog.text
