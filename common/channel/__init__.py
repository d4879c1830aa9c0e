"""Channels: where messages go, as a configuration names them. No database, no network, no job."""
