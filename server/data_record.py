"""What a run knows of its data: each file with the hash of what was read of it.

    {"data": [{"file": "/srv/train.jsonl", "rows": 7473, "hash": "16b4..."}], "evaluation": []}

A file may move or be renamed, and may be touched: what counts is the columns that were read. In a
simulation the record is of all its data; that of a ServerApp is of what it evaluates on.
"""

from typing import Any

from settings.run import RunSettings


def data_record(federation: Any, chat_template_file: str = "") -> dict[str, Any]:
    """The record of a federation's data, and of the template that its conversations go through.

    federation: of tasks/partition.py.
    Raises UsageError where that file cannot be read.
    """
    from tasks.partition import template_sources

    parts = {
        "data": federation.sources,
        "evaluation": federation.tests,
        "chat-template": template_sources(chat_template_file),
    }
    return {name: [_entry(source) for source in sources] for name, sources in parts.items()}


def evaluated_record(settings: RunSettings) -> dict[str, Any] | None:
    """The record of what the server evaluates on, and of the template; None where it does not.

    A test set of its own stands alone: what lies at data.path is then not evaluated on.
    """
    if not settings.evaluate.server:
        return None
    from tasks.partition import federate

    data = settings.data
    federation = federate(data, settings.clients.count, settings.seed, settings.task)
    record = data_record(federation, data.chat_template_file)
    if record["evaluation"]:
        del record["data"]
    return record


def _entry(source: Any) -> dict[str, Any]:
    return {"file": source.path, "rows": source.rows, "hash": source.fingerprint}
