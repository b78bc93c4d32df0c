"""Several private servers that belong together: a cluster, or a master watched by Sentinels.

    with Cluster() as cluster:
        print(cluster.url)  # redis://127.0.0.1:PORT/0, one node's
        cluster.master_of("key").kill()
        cluster.wait_ok()  # its replica was promoted

    with Sentinels() as sentinels:
        print(sentinels.url)  # redis+sentinel://HOST:PORT,HOST:PORT,HOST:PORT/SERVICE/0

Each server is a `relstream.server.Server`, on the loopback interface and ending with this process.
Break them at will: `restore` puts them back. POSIX only.
"""

from relstream.servers.cluster import Cluster
from relstream.servers.node import Node
from relstream.servers.sentinels import Sentinels

__all__ = ["Cluster", "Node", "Sentinels"]
