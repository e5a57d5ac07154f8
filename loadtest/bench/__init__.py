"""`ropeway bench`: one file for each measurement, and what only they need."""
