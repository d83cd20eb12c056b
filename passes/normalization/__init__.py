"""Exact rewrites that bring every model to one form when it is loaded."""
