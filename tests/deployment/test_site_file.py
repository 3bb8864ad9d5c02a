"""site.toml: what start-supernode.sh and bouquet check read from it."""

import tomllib
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args

from core.errors import UsageError
from deployment.folder import create_deployment
from deployment.plan import Plan
from deployment.site_file import read_site
from settings.keys import listed
from settings.paths import named_paths
from settings.site import KNOWN

LINES = {"superlink": "'localhost:9092'", "port": "9094"}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    plan = Plan("trial", "fed.example.org")
    create_deployment(tmp_path / "trial", plan, ["oslo"], sites_make_keys=False)
    return tmp_path / "trial" / "sites" / "oslo"


def written(folder: Path, node: str, **lines: str) -> Path:
    top = "\n".join(f"{name} = {value}" for name, value in (LINES | lines).items())
    (folder / "site.toml").write_text(f"{top}\n[node]\n{node}\n")
    return folder


def test_what_init_writes_is_read(site: Path) -> None:
    found = read_site(site)
    assert (found.superlink, found.port, found.insecure) == ("fed.example.org:9092", 9094, False)
    assert found.site.name == "oslo"
    assert found.site.data_path == str(site.resolve() / "data.jsonl")
    assert found.site.cache_path == str(site.resolve() / "cache")
    assert set(tomllib.loads((site / "site.toml").read_text())["node"]) <= set(KNOWN)


def test_flower_reads_the_node_config_as_it_was_meant(tmp_path: Path) -> None:
    node = "name = 'oslo'\nrank = 8\ndata-path = 'my data/a=b \"c\".jsonl'\nmodel-path = '/m'"
    found = read_site(written(tmp_path, node))
    parsed = parse_config_args([found.node_config])
    assert parsed == dict(found.node)
    assert parsed["data-path"] == str(tmp_path.resolve() / 'my data/a=b "c".jsonl')
    assert parsed["rank"] == 8


def test_several_files_and_the_embedded_model(tmp_path: Path) -> None:
    node = "data-path = 'a.jsonl, /b.jsonl'\nmodel-path = 'embedded'"
    found = read_site(written(tmp_path, node)).site
    assert found.data_path == f"{tmp_path.resolve()}/a.jsonl,/b.jsonl"
    assert found.model_path == "embedded"


def test_data_paths_may_hold_commas_and_lie_in_a_list(tmp_path: Path) -> None:
    (tmp_path / "a, b.jsonl").write_text("")
    node = "data-path = 'a, b.jsonl'\nevaluation-path = ['t, 1.csv', '/u[2].csv']\n"
    found = read_site(written(tmp_path, node))
    here = tmp_path.resolve()
    assert named_paths(str(found.site.data_path)) == (f"{here}/a, b.jsonl",)
    assert listed(str(found.site.evaluation_path)) == (f"{here}/t, 1.csv", "/u[2].csv")
    assert parse_config_args([found.node_config]) == dict(found.node)
    assert read_site(written(tmp_path, "model-path = 'a, b'")).site.model_path == f"{here}/a, b"


@pytest.mark.parametrize(
    ("node", "lines", "words"),
    [
        ("rnk = 8", {}, "the nearest known key is rank"),
        ("rank = 0", {}, "rank must be a whole number of at least 1"),
        ("device = ['a']", {}, "device must be a number or text"),
        ("", {"port": "'9094'"}, "port must be a number from 1 to 65535; got '9094'"),
        ("", {"superlink": "'localhost'"}, 'superlink must be "HOST:PORT"'),
        ("", {"rank": "8"}, "'rank' is not known here; expected superlink, port, trusted-entities"),
        ("", {"port": "9094 9095"}, "cannot be read"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, node: str, lines: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=r"site\.toml") as raised:
        read_site(written(tmp_path, node, **lines))
    assert words in str(raised.value)


def test_a_quote_cannot_be_passed_to_flower(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Flower takes no '"):
        _ = read_site(written(tmp_path, 'device = "o\'slo"')).node_config


def test_a_folder_without_site_toml(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no site's folder"):
        read_site(tmp_path)


def test_trusted_entities_are_a_file_of_the_site(tmp_path: Path) -> None:
    text = (
        'superlink = "a:1"\nport = 9094\ntrusted-entities = "trusted.yaml"\n[node]\nname = "oslo"\n'
    )
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(UsageError, match="trusted-entities must name a file of keys"):
        read_site(tmp_path)
    (tmp_path / "trusted.yaml").write_text("{}")
    assert read_site(tmp_path).trusted_entities == str(tmp_path / "trusted.yaml")
