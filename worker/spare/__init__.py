"""The trainers of a node that are no attempt's: the spare, made ahead, and hosts, which keep a base between jobs."""
