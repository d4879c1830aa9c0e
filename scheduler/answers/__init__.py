"""Answers to a person's questions: frozen values that hold their own JSON (as_json). No text is drawn here."""
