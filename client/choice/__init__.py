"""The choice of a backbone at a site: the vote of its records among candidates."""
