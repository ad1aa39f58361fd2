"""What a run is on disk: save, load, keep, verify."""
