"""Ranks: one training over several processes, one per card, led by rank 0. No recipe, no message, no files."""
