"""Load tests of the serving gateway: requests at planned times, measured from those times."""
