"""What a run will take, computed beforehand from its config and its base's size: arithmetic alone."""
