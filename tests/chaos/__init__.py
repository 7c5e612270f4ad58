"""Trials in which the server is broken on purpose, and the checker that says whether anything was lost."""
