"""What a population has spent: a durable chain of charges, and the rules on top of it."""
