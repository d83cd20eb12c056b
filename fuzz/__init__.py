"""Fuzzing: what reads files of strangers, and what computes with them. Nothing imports this; see README.md here."""
