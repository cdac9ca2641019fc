"""Jobs over many accounts, and the files of their outcomes."""
