"""This process, its machine and its peers: what a run stands on and no model knows of."""
