"""The job of `dmh demo`: a NumPy program over an array larger than its memory, and what a person sees of it.

`expected` computes what the array must hold, `program` is the NumPy program (a process of its own), `progress` collects
what it tells and what is observed of it, `display` shows that.  `dmh.cli.demo` starts and ends everything.
"""
