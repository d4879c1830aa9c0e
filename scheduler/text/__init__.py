"""Answers drawn as text for a terminal: an answer and a screen go in, a string comes out. Nothing is asked here."""
