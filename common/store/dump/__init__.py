"""PostgreSQL's database in one file, and back: rows as COPY has them, by no tool of PostgreSQL's. No job is judged."""
