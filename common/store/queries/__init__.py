"""What the store does inside a transaction, by theme. Each function takes the transaction, or its session, first."""
