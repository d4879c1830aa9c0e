"""What somebody sees who looks at all of the lab, as frozen values. Nothing is changed here, and no text is drawn."""
