"""Which labels there are, in the order of their classes. Importing this loads no torch."""

from core.errors import UsageError, listing
from settings.labels import label_order
from settings.run import DataSettings
from tasks.examples import CLASSIFICATION, read_data


def label_names(
    data: DataSettings, task: str, path: str | None = None, seed: int = 0
) -> tuple[str, ...]:
    """The labels in the order of the classes; none for a task without classes.

    They are those of data.labels, or else all in the data, sorted: by value where all are numbers,
    else as text.
    path: a site's own data, from which it cannot know the other sites' labels.
    seed: that of the run, so that the data are read once for labels and examples.

    Raises UsageError for fewer than two labels, or where a site's own data would have to tell them.
    """
    if task != CLASSIFICATION:
        return ()
    if named := data.listed_labels():
        return named
    if path is not None:
        raise UsageError(
            f"data.labels is empty, and {path} holds this site's labels only: set data.labels to "
            "the labels of all sites, separated by commas, the same in the whole run"
        )
    found = read_data(data, task=CLASSIFICATION, limit=data.max_examples, seed=seed).labels
    if len(found) < 2:
        raise UsageError(
            f"{data.path} has one label only in field {data.label!r}, {listing(found)}, and "
            "classification needs at least two: name the right field with data.label, or all "
            "labels with data.labels"
        )
    return tuple(label_order(set(found)))
