"""What a person may ask, as frozen values, each with one as_json. Commands, --json and pages read these alone."""
