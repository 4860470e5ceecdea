"""From a site's own files to units with cached features. The only room that opens a record."""
