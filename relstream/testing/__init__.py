"""Private servers for tests, benchmarks and trying: one, a cluster, or a master with Sentinels.

    with Server() as server:
        print(server.url)  # redis://127.0.0.1:PORT/0

    with Cluster() as cluster:
        print(cluster.url)  # redis://127.0.0.1:PORT/0, one node's
        cluster.master_of("key").kill()
        cluster.wait_ok()  # its replica was promoted

    with Sentinels() as sentinels:
        print(sentinels.url)  # redis+sentinel://HOST:PORT,HOST:PORT,HOST:PORT/SERVICE/0

Each server is a `Server`: it listens on the loopback interface, and ends with this process.
Break them at will: `restore` puts them back. POSIX only.
"""

from relstream.testing.cluster import Cluster
from relstream.testing.node import Node
from relstream.testing.sentinels import Sentinels
from relstream.testing.server import Server

__all__ = ["Cluster", "Node", "Sentinels", "Server"]
