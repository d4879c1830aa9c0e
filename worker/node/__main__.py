"""`python -m loractl.worker.node --index N`: what `loractl worker` starts for each device."""

from loractl.worker.node.secrecy import hide_environment

if __name__ == "__main__":
    hide_environment()  # before the imports, which take a second
    from loractl.worker.node.node import main

    main()
