"""The coordinator as its operators see it from outside: metrics and a status page on the loopback health port."""
