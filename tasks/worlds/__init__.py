"""The worlds of the quickstart."""
