"""The placement rule and its replay: from values to a decision. Pure: no SQL, no clock."""
