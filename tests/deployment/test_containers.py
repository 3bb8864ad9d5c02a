"""The Dockerfile and the compose file against the project: what can be said without a daemon."""

import re
from typing import Any

import pytest
import yaml

import hatch_build
from tools.rehearsal.loopback import ROOT

DOCKER = ROOT / "deployment" / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_the_image_holds_every_room_and_is_pinned() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE)
    sources = {word for line in copied for word in line.split()}
    assert {*hatch_build.ROOMS, "bouquet", "hatch_build.py", "pyproject.toml"} <= sources
    assert all((ROOT / source).exists() for source in sources)
    assert re.search(r"^FROM python:\d+\.\d+\.\d+-\S+$", text, re.MULTILINE)
    assert text.count("--constraint constraints.txt") == text.count("pip install")
    assert re.search(r"^USER [1-9]\d*$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("service", "secrets", "template"),
    [
        ("coordinator", {"ca.pem", "server.pem", "server.key"}, "start-superlink.sh"),
        ("site", {"ca.pem", "node.key"}, "start-supernode.sh"),
    ],
)
def test_a_container_may_little(service: str, secrets: set[str], template: str) -> None:
    found = COMPOSE["services"][service]
    assert found["read_only"]
    assert found["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in found["security_opt"]
    assert found["mem_limit"]
    assert "/health" in found["healthcheck"]["test"][-1]
    read_only = {mount for mount in found["volumes"] if mount.endswith(":ro")}
    assert {f"${{FOLDER}}/{name}:${{FOLDER}}/{name}:ro" for name in secrets} <= read_only
    assert set(found["volumes"]) - read_only == {"${FOLDER}:${FOLDER}"}
    assert found["command"] == [f"./{template}"]
    assert (ROOT / "deployment" / "templates" / template).is_file()
