"""Jobs that are there, changed: loractl edit, retry, hold and cancel.

Others use nothing of it.
"""
