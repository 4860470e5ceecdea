"""A site as its own staff sees it from outside: metrics and a status page on the loopback health port."""
