"""`python -m loractl.worker.node --index N`: what `loractl worker` starts for each device."""

import gc

from loractl.worker.protocol.secrecy import hide_environment

if __name__ == "__main__":
    hide_environment()  # before the imports, which take a second
    gc.disable()  # what they make stays to the end: looking through it costs a tenth of them
    from loractl.worker.node.node import main

    gc.freeze()
    gc.enable()
    main()
