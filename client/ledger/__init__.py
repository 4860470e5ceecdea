"""The spending of a population: a durable chain of charges, and the rules on top of it."""
