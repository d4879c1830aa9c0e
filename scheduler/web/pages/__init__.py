"""What each page shows: an answer, read from the store, and a template that draws it."""
