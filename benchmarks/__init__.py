"""What rtml costs, measured beside other engines in the same run."""
