"""The store's verbs by subject: each is a function of a transaction, and its caller gets a transaction for it."""
