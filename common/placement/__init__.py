"""The placement rule and its replay: values in, a decision out. Pure: no SQL, no clock, no file."""
