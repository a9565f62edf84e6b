"""Several runs beside each other: what differs in their configs, what came out, and their curves."""
