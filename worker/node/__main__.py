"""`python -m loractl.worker.node --index N`: what `loractl worker` starts for each device."""

import gc

from loractl.worker.protocol.secrecy import hide_environment

if __name__ == "__main__":
    hide_environment()  # before the imports, which take a second
    gc.disable()  # what the imports create lives until the end: scanning it would cost a tenth of their time
    from loractl.worker.node.node import main

    gc.freeze()
    gc.enable()
    main()
