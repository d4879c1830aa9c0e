"""Other tools' configurations, turned into job files. No database, no queue."""
