"""A process that makes a node's calls of the artifact store (`client`).

    python -m loractl.worker.attempt.storage

A call that hangs, as on a hard NFS mount, blocks only this process: the node abandons it and takes another.
"""

import signal

from loractl.worker.protocol.secrecy import hide_environment

if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)  # Slurm tells all of an allocation: the last checkpoint is under way
    hide_environment()  # before the imports, which take half a second
    from .client import main

    main()
