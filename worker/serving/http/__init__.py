"""The server of loractl serve: OpenAI's HTTP API over the decoder. No other room imports it."""
