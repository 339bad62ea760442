"""Runs circuits elsewhere: behind HTTP, and on the workers of a Dask cluster.

disk: writes and removes files of keys.
keystore: stores evaluation keys on the disk.
works: divides a ciphertext among workers.
admission: decides which requests may run, and runs them.
tls: encrypts connections.
connections: closes connections that wait too long.
problems: turns errors into answers.
metrics: counts requests, for Prometheus.
routes: defines what the server takes and answers.
request_log: writes the log.
app: the entry: the server.
remote: the server's client.
spreading: spreads one image over the workers of a cluster.
jobs: opens circuits on the workers of a cluster.
distributed: runs batches, tiles and spread images on a cluster.
"""
