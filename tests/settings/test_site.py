"""A site's own settings: read from its node config, refused where they make no sense."""

import re

import pytest

from core.errors import UsageError
from settings.keys import Value
from settings.site import KNOWN, Site, client_name, parse_site


def test_a_simulated_client_is_called_by_its_number() -> None:
    assert parse_site({"partition-id": 3, "num-partitions": 10}) == Site("client-03", 3)
    assert client_name(123) == "client-123"


def test_a_site_without_config_is_client_zero() -> None:
    assert parse_site({}) == Site("client-00", 0)


def test_a_site_owns_its_rank_data_model_device_and_name() -> None:
    config: dict[str, Value] = {
        "name": "oslo",
        "rank": 8,
        "data-path": "/data/oslo.jsonl",
        "evaluation-path": "/data/oslo-test.jsonl",
        "model-path": "/models/base",
        "device": "cuda:1",
        "cache-path": "/var/cache/bouquet",
        "partition-id": 2,
    }
    data = ("/data/oslo.jsonl", "/data/oslo-test.jsonl")
    own = (*data, "/models/base", "cuda:1", "/var/cache/bouquet")
    assert parse_site(config) == Site("oslo", 2, 8, *own)


def test_what_a_site_does_not_own_is_left_to_the_run() -> None:
    site = parse_site({"name": "oslo"})
    assert (site.rank, site.data_path, site.model_path, site.device) == (None,) * 4


@pytest.mark.parametrize(
    ("typed", "near"),
    [("ranks", "rank"), ("data_path", "data-path"), ("partition", "partition-id")],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(typed: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"{typed!r}; the nearest known key is {near}"):
        parse_site({typed: 1})


@pytest.mark.parametrize("value", [0, -1, 2.0, "8", True])
def test_a_rank_is_a_whole_number_of_at_least_one(value: Value) -> None:
    expected = f"the site's rank must be a whole number of at least 1; got {value!r}"
    with pytest.raises(UsageError, match=re.escape(expected)):
        parse_site({"rank": value})


@pytest.mark.parametrize("value", [-1, 1.0, "0", False])
def test_a_partition_is_a_whole_number_of_at_least_zero(value: Value) -> None:
    expected = f"partition-id must be a whole number of at least 0; got {value!r}"
    with pytest.raises(UsageError, match=re.escape(expected)):
        parse_site({"partition-id": value})


@pytest.mark.parametrize("value", [0, -3, 2.5, "ten", True])
def test_the_number_of_partitions_is_a_whole_number_of_at_least_one(value: Value) -> None:
    expected = f"num-partitions must be a whole number of at least 1; got {value!r}"
    with pytest.raises(UsageError, match=re.escape(expected)):
        parse_site({"num-partitions": value})


def test_numbers_will_do_for_text() -> None:
    assert parse_site({"name": 7, "data-path": 5}) == Site("7", 0, data_path="5")


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_key_is_taken(name: str) -> None:
    assert parse_site({name: True if name == "trust-remote-code" else 1}) is not None


def test_consent_to_run_code_is_true_or_false() -> None:
    assert parse_site({"trust-remote-code": True}).trust_remote_code
    assert not parse_site({}).trust_remote_code
    with pytest.raises(UsageError, match="trust-remote-code must be true or false; got 'yes'"):
        parse_site({"trust-remote-code": "yes"})
