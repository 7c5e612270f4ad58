"""Trials of several nodes on one PostgreSQL: each breaks something else, and the checker says what came of it."""
