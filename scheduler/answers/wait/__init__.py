"""Why a job waits and when it starts, by asking the placement rule. No query and no clock: rows and cards are given."""
