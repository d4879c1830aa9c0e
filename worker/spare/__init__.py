"""The spare trainer of a node: made ahead, handed over to an attempt, replaced."""
