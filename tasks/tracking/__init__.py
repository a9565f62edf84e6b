"""What MLflow is told of a run, and how it arrives once."""
