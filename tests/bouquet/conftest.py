"""A call gives the process its loading bars back; the tests after it expect none."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def without_bars_afterwards() -> Iterator[None]:
    """As every other test leaves transformers, which a run in this process has silenced."""
    yield
    import transformers

    transformers.logging.disable_progress_bar()
