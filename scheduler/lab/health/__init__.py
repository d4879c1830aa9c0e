"""Whether an installation works: what doctor looks at, and what it finds. Nothing is changed that stays."""
