"""
How a worker is: for whoever starts it again, and for whoever is woken.

    serving     the port: /live, /ready, /metrics
    watching    what relays tell, kept as metrics; when a worker counts as ready
    telling     what the database says, as metrics
    metrics     what the process itself knows, under which names
    figures     what the database is asked, by one query every few seconds at most

Nothing here is loaded unless HLF_METRICS_PORT is set.
"""
