"""Records of many items: grouped rows, and the tiles of slides."""
