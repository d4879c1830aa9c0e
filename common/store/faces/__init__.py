"""Parts of the store's face, by who uses them: gc, the page, a node. Each method is a verb in one transaction."""
