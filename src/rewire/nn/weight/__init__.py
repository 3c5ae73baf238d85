"""A sparse weight: its pool of connections, what it tells its followers, loading and sealing."""
