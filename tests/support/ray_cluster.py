"""A Ray cluster of two nodes of one processor each, in processes of this machine, until standard input ends.

Run by a Python that has Ray; its first line is the cluster's address.
"""

from __future__ import annotations

import os
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.cluster_utils import Cluster

STORE_BYTES = 80 << 20
NODE = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
# Ray gives a node half a minute to start, which on a machine that does much beside is not enough.
TRIES = 6


def started() -> Cluster:
    """Both nodes. Raises what Ray does where they do not start."""
    for left in reversed(range(TRIES)):
        cluster = Cluster()
        try:
            cluster.add_node(**NODE, include_dashboard=False)
            cluster.add_node(**NODE)
            return cluster
        except Exception:
            if not left:
                raise
            cluster.shutdown()
    raise AssertionError


if __name__ == "__main__":
    cluster = started()
    sys.stdout.write(f"{cluster.address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    cluster.shutdown()
