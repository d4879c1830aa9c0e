"""Care for an installation: backups, and the removal of garbage. It prints nothing."""
