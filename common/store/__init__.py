"""The jobs' database, and the only room with queries. Others call Store alone; records and rows go in and out."""
