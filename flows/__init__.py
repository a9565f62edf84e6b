"""When: the loops, the wiring and the command line; passes references only."""
