"""Training data and corpora: what files hold, read once and kept as Arrow tables that are mapped into memory."""
