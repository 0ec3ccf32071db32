"""Training data and corpora. Files are read once and kept as Arrow tables that are mapped into memory."""
