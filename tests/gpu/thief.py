"""A program of somebody else: takes memory of the card and keeps it until its input ends.

    python -m tests.gpu.thief cuda BYTES SECONDS

It waits so many seconds first. Never managed memory: what others can't see as taken would crash the box.
"""

from __future__ import annotations

import sys
import time


def main() -> None:
    import torch

    device, size, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    time.sleep(seconds)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else size
    taken = torch.zeros(max(1, min(size, free - 2**28)), dtype=torch.uint8, device=device)
    print(f"took {taken.nbytes}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
