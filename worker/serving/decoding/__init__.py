"""Answers, token by token: requests for different adapters in one batch. No HTTP."""
