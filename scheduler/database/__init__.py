"""The database's form, backups and roles: loractl db.

Others use answer.
"""
