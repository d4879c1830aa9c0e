"""Why a job waits and when it will start. Pure: from rows and cards, by asking the placement rule."""
