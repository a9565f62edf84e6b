"""Where: one Prefect task a stage; read artifacts, call the core, write one artifact."""
