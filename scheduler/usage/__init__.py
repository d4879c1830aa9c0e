"""How much everybody has used the cards, and quotas on it: loractl usage and quota.

Others use answer.
"""
