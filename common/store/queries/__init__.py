"""What the store does inside a transaction, by theme: functions that take it first. Store alone calls them."""
