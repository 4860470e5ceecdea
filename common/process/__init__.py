"""What the programs of both sides share: progress, error sentences, health, threads."""
