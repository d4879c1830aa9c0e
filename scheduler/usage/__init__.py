"""What everybody has had of the cards, and quotas of it: loractl usage and quota.

Others use answer.
"""
