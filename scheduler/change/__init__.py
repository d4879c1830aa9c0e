"""Changes of existing jobs: loractl edit, retry, hold, release and cancel.

Others use nothing of it.
"""
