"""`python -m loractl.worker.node --index N`: what the worker command starts for each device."""

from loractl.worker.node.node import main

main()
