"""The lab from Python, as `loractl.connect()` gives it: what the commands do, as values; it loads no training stack.

Others use nothing of it.
"""
