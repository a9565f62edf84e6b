"""How a run starts, goes on, is kept, cleaned and repaired."""
