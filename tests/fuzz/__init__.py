"""Fuzzers: minutes of chance against a real gateway."""
