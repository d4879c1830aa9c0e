"""Other tools' configurations as job files. No database."""
