"""What every command shares: the list of them all, the session that it opens, jobs by name, what it prints.

Others use all of it.
"""
