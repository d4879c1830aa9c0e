"""Ranks: one training over several processes, one a card, of which rank 0 leads. No recipe, no message, no files."""
