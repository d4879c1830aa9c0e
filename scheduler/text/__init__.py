"""Answers drawn for people, as text for a terminal or as a picture. No query, no JSON: all that is shown is given."""
