"""The harness of the C runtime."""
