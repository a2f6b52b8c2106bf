"""`dmh stress`: programs on one region, every word next to a shadow, while workers and the store are killed.

`run` has the whole course; `program` is what each program does; `killer`, `server` and `look` act on and look at the
service from outside; `verdict` collects what was found.  Called by `dmh.cli.stress`.
"""
