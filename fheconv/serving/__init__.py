"""Runs circuits elsewhere: behind HTTP, and on the workers of a Dask cluster.

keystore: evaluation keys on the disk.
admission: which requests may run, and who runs them.
problems: errors as answers.
request_log: the log.
app: the entry: the server.
remote: its client.
distributed: batches and tiles over a cluster.
"""
