"""Changes of existing jobs: loractl edit, retry, hold and cancel.

Others use nothing of it.
"""
