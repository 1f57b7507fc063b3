"""Faults on purpose: who is killed, when, and what was really hit."""
