"""The choice of a backbone among candidates: by a vote of simulated sites, or on public records."""
