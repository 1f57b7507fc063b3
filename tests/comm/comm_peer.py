"""A worker process, for tests that kill it: joins worker 0, reports that, then runs the given behaviour.

comm_peer.py WORKER KIND BEHAVIOUR      stdin: worker 0's address; stdout: our address, then "joined"
"""

from __future__ import annotations

import os
import signal
import sys

import numpy as np
from comm_cluster import Peer, tag

from elastic.comm import Network


def main() -> None:
    worker, kind, behaviour = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    tcp = kind == "tcp"
    network = Network(worker, secret=b"secret", host=f"host-{worker}" if tcp else "host", interface="127.0.0.1" if tcp else None)
    print(network.address, flush=True)
    members = [Peer(0, "host-0" if tcp else "host", sys.stdin.readline().strip()), Peer(worker, "host", network.address)]
    network.install(1, 0, members, [0])
    if behaviour == "fork":
        if os.fork() == 0:
            signal.pause()
    elif behaviour == "fork_and_answer":
        if os.fork() == 0:
            os._exit(0)
        os.wait()
        network.send(0, tag(), network.receive(0, tag()))
    elif behaviour == "half_a_message":
        # Nobody reads at the other end, so only a part of this fits into the socket.
        network.receive(0, tag())
        network.send(0, tag(), np.ones(50_000_000, np.uint8))
    print("joined", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
