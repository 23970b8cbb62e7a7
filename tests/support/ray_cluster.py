"""A Ray cluster of two nodes of one processor each, in processes of this machine, until standard input ends.

Run by a Python that has Ray; its first line is the cluster's address.
"""

from __future__ import annotations

import os
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray's workers let all else go first: beside other tests they would hardly start.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 Ray spells it so

from ray.cluster_utils import Cluster

STORE_BYTES = 80 << 20
NODE = {"num_cpus": 1, "object_store_memory": STORE_BYTES}

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    cluster.add_node(**NODE)
    sys.stdout.write(f"{cluster.address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    cluster.shutdown()
