"""Traces of jobs replayed on a fleet under our rule and others. No database."""
