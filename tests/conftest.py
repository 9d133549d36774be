"""One thread: the models of these tests are so small that more of them only wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is imported, and for the processes that tests start
)
