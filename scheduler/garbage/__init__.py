"""What no one needs any more, found and removed: loractl gc.

Others use nothing of it.
"""
