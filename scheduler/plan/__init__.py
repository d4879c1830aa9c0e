"""What a job will need of a card, before it runs: loractl plan.

Others use nothing of it.
"""
