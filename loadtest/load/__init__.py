"""`ropeway loadtest`: what users ask and see, the runs, their bounds, the report."""
