"""Queries of cards: what nodes say of their devices, who gives way there, and the round for the whole fleet."""
