"""Measurements, run by hand: each is a module that prints a table."""
