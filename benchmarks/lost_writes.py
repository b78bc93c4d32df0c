"""What an asynchronous failover loses: announcements that were acknowledged, and are gone after it.

    python benchmarks/lost_writes.py [ROUNDS]

A producer announces as fast as it can to a private cluster. The replica of the balancer stream's
master stops (SIGSTOP), as on a network that falters; a little later the master is killed, and the
replica, which goes on then, is promoted. Counted is what the master had acknowledged before it
died, by what the producer and the servers do about it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from statistics import median

import redis

from relstream.lbs.names import message
from relstream.testing import Cluster, Node

LBS = "svc-input"
BEHIND = 0.3
"""Seconds for which the replica stands still before the master is killed."""
ALONE = 0.5
"""Seconds of announcing before that."""
WAIT_MS = 200
TOGETHER = 20
INFO = {"a": "x" * 10_000}
"""Announcements of this size: what fits into the buffers of sockets (some MB) reaches the replica
even after its master's death."""


class Announcing(threading.Thread):
    """Announces one by one; remembers what it was told is there."""

    def __init__(self, node: Node, wait: bool) -> None:
        super().__init__()
        self._redis = redis.Redis(host="127.0.0.1", port=node.port, socket_timeout=5)
        self._wait = wait
        self.acknowledged: list[bytes] = []
        self.refused = 0

    def run(self) -> None:
        number = 0
        try:
            while True:
                number += 1
                pipe = self._redis.pipeline(transaction=False)
                for i in range(TOGETHER):
                    pipe.xadd(LBS, {"lbs-input": message(f"s{number}.{i}", INFO)})
                if self._wait:
                    pipe.execute_command("WAIT", 1, WAIT_MS)
                replies = pipe.execute(raise_on_error=False)
                enough = not self._wait or replies.pop() == 1
                # Those refused are NOREPLICAS.
                ids = [reply for reply in replies if enough and isinstance(reply, bytes)]
                self.acknowledged += ids
                self.refused += TOGETHER - len(ids)
        except redis.ConnectionError:
            self._redis.close()


def lost(cluster: Cluster, *, behind: float, wait: bool = False, replicas: int = 0) -> int:
    """How many acknowledged announcements a failover loses."""
    cluster.restore()
    master = cluster.master_of(LBS)
    (replica,) = cluster.replicas(of=master)
    for node in (master, replica):
        node.client.config_set("min-replicas-to-write", replicas)
        node.client.config_set("min-replicas-max-lag", 1)
    announcing = Announcing(master, wait)
    announcing.start()
    time.sleep(ALONE)
    if behind:
        replica.pause()
        time.sleep(behind)
    master.kill()
    if behind:
        replica.resume()
    announcing.join()
    cluster.wait_ok(30)
    new = cluster.master_of(LBS)
    new.client.config_set("min-replicas-to-write", 0)
    there = {entry_id.encode() for entry_id, _ in new.client.xrange(LBS)}
    missing = sum(entry_id not in there for entry_id in announcing.acknowledged)
    print(f"    {len(announcing.acknowledged)} acknowledged, {missing} lost,", end=" ")
    print(f"{announcing.refused} not acknowledged")
    return missing


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    cases: dict[str, Callable[[Cluster], int]] = {
        "killed, the replica keeps up": lambda c: lost(c, behind=0.0),
        "killed, the replica 0.3 s behind": lambda c: lost(c, behind=BEHIND),
        "0.3 s behind, WAIT 1": lambda c: lost(c, behind=BEHIND, wait=True),
        "0.3 s behind, min-replicas-to-write 1": lambda c: lost(c, behind=BEHIND, replicas=1),
        "4 s behind": lambda c: lost(c, behind=4.0),
        "4 s behind, min-replicas-to-write 1": lambda c: lost(c, behind=4.0, replicas=1),
        "4 s behind, WAIT 1": lambda c: lost(c, behind=4.0, wait=True),
    }
    with Cluster() as cluster:
        for what, case in cases.items():
            print(what)
            counts = [case(cluster) for _ in range(rounds)]
            print(f"  lost: median {median(counts):g}, worst {max(counts)}")


if __name__ == "__main__":
    main()
