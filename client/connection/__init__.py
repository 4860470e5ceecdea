"""A deployed site's way to its coordinator: keys, startup kit, Fleet API, worker process, diagnosis."""
