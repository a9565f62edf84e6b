"""One run in one process: its files, its plan, its models. Everything in memory is found again from the run folder."""
