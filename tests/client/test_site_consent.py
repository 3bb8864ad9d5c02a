"""Code that a model brings along runs at a site only where the site itself consents."""

from pathlib import Path

import pytest

from core.errors import UsageError
from models.tuned_model import resident_model
from settings.run import run_settings
from settings.site import parse_site
from tests.models.test_base_model import with_code
from tools.rehearsal.tiny_models import save_llama


@pytest.mark.parametrize(
    ("coordinator", "site", "runs"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_both_must_trust(coordinator: bool, site: bool, runs: bool, tmp_path: Path) -> None:
    folder = with_code(save_llama(tmp_path / "model"), "a")
    settings = run_settings(
        {"model.path": "some/model", "model.trust-remote-code": coordinator, "model.device": "cpu"}
    )
    own = parse_site(
        {
            "name": "oslo",
            "data-path": "data.jsonl",
            "model-path": str(folder),
            "trust-remote-code": site,
        }
    )
    if runs:
        tuned = resident_model(settings.model, settings.lora, own)
        assert type(tuned.model).__name__ == "OwnForCausalLM"
        return
    with pytest.raises(UsageError, match=r"trust-remote-code = true in its site.toml"):
        resident_model(settings.model, settings.lora, own)


def test_simulated_clients_trust_what_the_run_trusts(tmp_path: Path) -> None:
    folder = with_code(save_llama(tmp_path / "model"), "a")
    settings = run_settings({"model.path": str(folder), "model.trust-remote-code": True})
    tuned = resident_model(settings.model, settings.lora, parse_site({"partition-id": 1}))
    assert tuned is resident_model(settings.model, settings.lora)
