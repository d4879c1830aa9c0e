"""Other tools' configurations as job files: loractl import. No database, no queue.

Others use nothing of it.
"""
