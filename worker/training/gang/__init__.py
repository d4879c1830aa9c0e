"""A training on several cards: its processes, and what they make ready together. Steps are the engine's business."""
