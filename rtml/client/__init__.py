"""The submitter's side: clients, futures, remote functions. The public names are re-exported by `rtml`."""
