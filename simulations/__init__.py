"""In-process runtime, experiments and the command line."""

import os

# numpy's small decompositions gain nothing from a second thread and lose much where it has to wait
# for a core. Read once, when numpy is loaded, which is after this.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
