"""Whether an installation works: what doctor checks, and what it finds. No change stays."""
