"""`python -m loractl.worker.node --index N`: what `loractl worker` starts for each device."""

from loractl.worker.node.node import main

if __name__ == "__main__":
    main()
