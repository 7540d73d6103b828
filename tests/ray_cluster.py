"""A Ray cluster on this machine: python tests/ray_cluster.py

It runs in a process of its own, because Ray changes the process that starts a cluster: signal handlers, threads, and
what happens when a part of the cluster dies. Prints the address, then obeys "add" and "remove" on standard input.
"""

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    """Start one worker of two cores; add and remove a further one; stop at the end of standard input."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    added = []
    for command in sys.stdin:
        if command == "add\n":
            added.append(cluster.add_node(num_cpus=2))
            cluster.wait_for_nodes()
        else:
            cluster.remove_node(added.pop(), allow_graceful=False)
        print("done", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
