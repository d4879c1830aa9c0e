"""The only room with queries. Its face is Store; values cross it as records and rows."""
