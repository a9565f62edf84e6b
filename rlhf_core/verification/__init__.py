"""Re-reading everything that a run has written: what is damaged, and what can be recovered."""
