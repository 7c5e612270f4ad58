"""Benchmarks: each is ``python -m tests.benchmarks.<name> [options]`` and prints Markdown for ``docs/performance.md``.

They are no tests: pytest does not collect them, and nothing in them has a bar to pass.
"""
